"""GLiNER, accelerated: named entities of the kinds one asks for, and a training step's gradients.

    python examples/dropin_gliner.py [MODEL]

Without a GLiNER's folder or hub name its weights are random, on a small DeBERTa-v3, which shows the
calls and that all scores are the stock model's, but finds nothing true.
"""

import argparse
import re
import tempfile
import time

from stdlib_text import deberta_v3, docstrings, minilm
from transformers import AutoTokenizer, set_seed

import bertfast

try:
    from gliner import GLiNER, GLiNERConfig
except ImportError as e:
    # it asks for transformers below 5.17, and works with later ones
    raise SystemExit(f"{e}; expected GLiNER: pip install --no-deps gliner") from e

KINDS = ["function", "type", "file"]


def untrained():
    """A GLiNER on a DeBERTa-v3 with random weights, and the tokenizer that is here."""
    with tempfile.TemporaryDirectory() as folder:
        AutoTokenizer.from_pretrained(minilm()).save_pretrained(folder)
        config = GLiNERConfig(
            model_name=folder, hidden_size=256, max_width=4, encoder_config=deberta_v3().to_dict()
        )
        return GLiNER.from_config(config, backbone_from_pretrained=False)


def gradients(model, texts):
    """Of every parameter, dropout off; "file" is to be found where the word stands."""
    set_seed(0)  # the collator draws other kinds to be told apart
    words = [re.findall(r"\w+", text) for text in texts]
    examples = [
        {"tokenized_text": w, "ner": [[i, i, "file"] for i, word in enumerate(w) if word == "file"]}
        for w in words
    ]
    collate = model.data_collator_class(
        model.config, data_processor=model.data_processor, prepare_labels=True
    )
    model.zero_grad()
    model(**collate(examples)).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def search(model, texts):
    """Entities, the scores of all spans for all kinds, and the seconds both took."""
    options = ({}, {"threshold": 0.0, "flat_ner": False, "multi_label": True})
    model.inference(texts, KINDS)
    start = time.perf_counter()
    found = [
        {
            (i, e["start"], e["end"], e["label"]): e["score"]
            for i, row in enumerate(model.inference(texts, KINDS, **more))
            for e in row
        }
        for more in options
    ]
    return *found, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a GLiNER's folder or name")
    name = parser.parse_args().model
    set_seed(0)
    model = (GLiNER.from_pretrained(name) if name else untrained()).eval()
    texts = list(docstrings("shutil").values())[:16]

    entities, scores, before = search(model, texts)
    grads = gradients(model, texts)
    report = bertfast.accelerate(model)  # the one line: it finds the encoder inside
    same, ours, after = search(model, texts)
    print(report)
    same = len(same.keys() & entities.keys()) / len(same.keys() | entities.keys())
    apart = max(abs(ours[span] - score) for span, score in scores.items())
    print(f"{len(scores)} scores within {apart:.1e}; {before / after:.2f} times as fast")
    print(f"share of the entities that both find: {same:.3f} of {len(entities)}")
    found = gradients(model, texts)
    apart = max(((found[n] - g).norm() / g.norm()).item() for n, g in grads.items() if g.any())
    print(f"gradients of {len(grads)} parameters within {apart:.1e}")


if __name__ == "__main__":
    main()
