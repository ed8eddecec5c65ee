"""sentence-transformers, accelerated: encode and search, then train on pairs and search again.

python examples/dropin_sentence_transformers.py
"""

import tempfile

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from stdlib_text import docstrings, minilm

import bertfast

MODULES = ("asyncio", "collections", "itertools", "json", "math", "os", "random", "re", "socket")


def found_first(model, names, texts) -> float:
    """How many functions' docstrings are the nearest to their names."""
    scores = model.similarity(*(model.encode(t, show_progress_bar=False) for t in (names, texts)))
    return (scores.argmax(1) == scores.new_tensor(range(len(names)))).float().mean().item()


def main():
    model = SentenceTransformer(minilm(), device="cpu")
    print(bertfast.accelerate(model))  # the one line: it finds the encoder inside

    pairs = [
        (f"{module} {name}".replace("_", " "), text)
        for module in MODULES
        for name, text in docstrings(module).items()
    ]
    test, train = pairs[::4], [p for i, p in enumerate(pairs) if i % 4]
    names, texts = (list(column) for column in zip(*test, strict=True))
    print(f"names whose docstring is found first: {found_first(model, names, texts):.2f}")

    with tempfile.TemporaryDirectory() as folder:
        SentenceTransformerTrainer(
            model,
            SentenceTransformerTrainingArguments(
                folder,
                num_train_epochs=1,
                per_device_train_batch_size=16,
                learning_rate=5e-5,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict(
                dict(zip(("anchor", "positive"), map(list, zip(*train, strict=True)), strict=True))
            ),
            loss=MultipleNegativesRankingLoss(model),
        ).train()
    print(f"after training on {len(train)} pairs: {found_first(model, names, texts):.2f}")


if __name__ == "__main__":
    main()
