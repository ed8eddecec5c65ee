"""sentence-transformers with a ModernBERT, accelerated: embeddings, and a step of training.

    python examples/dropin_modernbert.py [MODEL]

Without a model's folder or hub name its weights are random, of half ModernBERT-base's width, which
shows the calls and that all results are the stock model's.
"""

import argparse
import tempfile
import time

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from stdlib_text import docstrings, minilm
from transformers import AutoTokenizer, ModernBertConfig, ModernBertModel, set_seed

import bertfast


def untrained() -> SentenceTransformer:
    """Six of the layers, two of them global, and the tokenizer that is here."""
    config = ModernBertConfig(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=6,
        intermediate_size=576,
        pad_token_id=0,
        bos_token_id=101,
        eos_token_id=102,
    )
    with tempfile.TemporaryDirectory() as folder:
        AutoTokenizer.from_pretrained(minilm()).save_pretrained(folder)
        ModernBertModel(config).save_pretrained(folder)
        return SentenceTransformer(folder, device="cpu")


def gradients(model, pairs):
    """Of every parameter, of a batch of (name, text)."""
    loss = MultipleNegativesRankingLoss(model)
    model.zero_grad()
    loss([model.preprocess(list(column)) for column in zip(*pairs, strict=True)], None).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a ModernBERT's folder or name")
    name = parser.parse_args().model
    set_seed(0)
    model = SentenceTransformer(name, device="cpu") if name else untrained()
    pairs = [pair for module in ("shutil", "os") for pair in docstrings(module).items()]
    texts = [text for _, text in pairs]

    def embeddings():
        model.encode(texts[:8])
        start = time.perf_counter()
        found = model.encode(texts, convert_to_tensor=True)
        return found, time.perf_counter() - start

    (stock, before), grads = embeddings(), gradients(model, pairs[:16])
    print(bertfast.accelerate(model))  # the one line: it finds the encoder inside
    (ours, after), found = embeddings(), gradients(model, pairs[:16])
    apart = ((ours - stock).norm() / stock.norm()).item()
    print(f"same embeddings within {apart:.1e}; {before / after:.2f} times as fast")
    apart = max(((found[n] - g).norm() / g.norm()).item() for n, g in grads.items() if g.any())
    print(f"gradients of {len(grads)} parameters within {apart:.1e}")


if __name__ == "__main__":
    main()
