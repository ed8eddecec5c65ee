"""Two-stage search: a SentenceTransformer finds candidates, a CrossEncoder re-ranks them.

    python examples/dropin_cross_encoder.py [--reranker MODEL]

Without a re-ranker's folder or hub name its weights are MiniLM's with an untrained head, which
shows the calls and that both give the stock model's scores, but no better order.
"""

import argparse
import time

from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.util import semantic_search
from stdlib_text import docstrings, minilm
from transformers import set_seed

import bertfast

QUESTIONS = ["split a path into its parts", "wait for a coroutine", "draw a random number"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reranker", default=minilm(), help="a cross-encoder's folder or name")
    args = parser.parse_args()
    set_seed(0)
    finder = SentenceTransformer(minilm(), device="cpu")
    reranker = CrossEncoder(args.reranker, num_labels=1, max_length=128, device="cpu")
    names = {}
    for module in ("os", "os.path", "asyncio", "random", "json", "re"):
        names |= {text: f"{module}.{name}" for name, text in docstrings(module).items()}
    texts = list(names)

    def search():
        start = time.perf_counter()
        found = semantic_search(finder.encode(QUESTIONS), finder.encode(texts), top_k=20)
        answers = []
        for question, hits in zip(QUESTIONS, found, strict=True):
            candidates = [texts[hit["corpus_id"]] for hit in hits]
            answers.append(
                [
                    (r["score"], candidates[r["corpus_id"]])
                    for r in reranker.rank(question, candidates)
                ]
            )
        return answers, time.perf_counter() - start

    search()
    stock, before = search()
    for model in finder, reranker:
        print(bertfast.accelerate(model))  # the one line
    search()
    ours, after = search()

    apart = max(
        abs(a - b)
        for x, y in zip(stock, ours, strict=True)
        for (a, _), (b, _) in zip(x, y, strict=True)
    )
    print(f"same scores within {apart:.1e}; {before / after:.2f} times as fast")
    for question, ranked in zip(QUESTIONS, ours, strict=True):
        print(f"{question}: " + ", ".join(names[text] for _, text in ranked[:3]))


if __name__ == "__main__":
    main()
