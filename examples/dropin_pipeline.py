"""A transformers pipeline, accelerated: which of the standard library's functions does this?

python examples/dropin_pipeline.py
"""

import torch
from stdlib_text import docstrings, minilm
from transformers import pipeline

import bertfast

QUESTIONS = ["split a path into its parts", "wait for a coroutine", "draw a random number"]


def embed(extractor, texts):
    """[texts, hidden]: the normalised mean over each text's tokens. One text at a time: this
    pipeline gives padded positions with the rest, and those are zeros in an accelerated model."""
    states = extractor(texts, return_tensors=True)
    return torch.nn.functional.normalize(torch.stack([s[0].mean(0) for s in states]), dim=-1)


def main():
    extractor = pipeline("feature-extraction", model=minilm(), device="cpu")
    names = {}
    for module in ("os", "os.path", "asyncio", "random", "json", "re"):
        names |= {f"{module}.{name}": text for name, text in docstrings(module).items()}
    stock = embed(extractor, QUESTIONS)

    print(bertfast.accelerate(extractor.model))  # the one line

    print(f"same output within {(embed(extractor, QUESTIONS) - stock).abs().max():.1e}")
    scores = embed(extractor, QUESTIONS) @ embed(extractor, list(names.values())).T
    for question, row in zip(QUESTIONS, scores, strict=True):
        best = list(names)[row.argmax()]
        print(f"{question}: {best} ({row.max():.2f})")


if __name__ == "__main__":
    main()
