"""A CrossEncoder on DeBERTa-v3, accelerated: the same scores sooner.

    python examples/dropin_deberta_reranker.py [MODEL]

Without a re-ranker's folder or hub name its weights are random, of half DeBERTa-v3-base's width and
depth, which shows the calls and that both give the stock model's scores, but no good order.
"""

import argparse
import tempfile
import time

import torch
from sentence_transformers import CrossEncoder
from stdlib_text import deberta_v3, docstrings, minilm
from transformers import AutoTokenizer, DebertaV2ForSequenceClassification, set_seed

import bertfast

QUERY = "move a file to another folder"


def untrained() -> CrossEncoder:
    config = deberta_v3(initializer_range=0.05, num_labels=1)
    with tempfile.TemporaryDirectory() as folder:
        AutoTokenizer.from_pretrained(minilm()).save_pretrained(folder)
        DebertaV2ForSequenceClassification(config).save_pretrained(folder)
        return CrossEncoder(folder, max_length=256, device="cpu")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a DeBERTa re-ranker's folder or name")
    name = parser.parse_args().model
    set_seed(0)
    reranker = CrossEncoder(name, device="cpu") if name else untrained()
    texts = [text for module in ("shutil", "os") for text in docstrings(module).values()][:64]
    pairs = [(QUERY, text) for text in texts]

    def scores():
        reranker.predict(pairs[:8])
        start = time.perf_counter()
        found = reranker.predict(pairs, activation_fn=torch.nn.Identity())
        return torch.as_tensor(found), time.perf_counter() - start

    stock, before = scores()
    print(bertfast.accelerate(reranker))  # the one line: it finds the encoder inside
    ours, after = scores()
    apart = ((ours - stock).norm() / stock.norm()).item()
    print(f"same scores within {apart:.1e}; {before / after:.2f} times as fast")
    print(texts[ours.argmax()])


if __name__ == "__main__":
    main()
