"""`bertfast.freeze` on the objects of sentence-transformers: MiniLM on a CPU beside stock in fp32.

    python benchmarks/frozen.py [--rounds 3] [--texts 512] [--ranked 2000] [--corpus FILE]

SentenceTransformer.encode of `--texts` sentences and CrossEncoder.predict of half as many pairs,
frozen in each precision, accelerated, and stock with SDPA. In the same run: the cosine of every
embedding to stock's, and how many of a text's ten nearest others are stock's, over `--ranked` texts
(of `--corpus`, a line each, or the standard library's docstrings, as all other text). Then
`load_frozen` of what was frozen in int8, in a process of its own: seconds, and the resident memory
that it and a first call added, beside the bytes of the files.
"""

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from dropin import sentences
from harness import minilm, save
from sentence_transformers import CrossEncoder, SentenceTransformer

import bertfast
from bertfast.bench.command import table
from bertfast.bench.measure import take_turns

PRECISIONS = ("fp32", "bf16", "int8")
COSINE = {"fp32": 0.999999, "bf16": 0.9999, "int8": 0.998}  # the mean, least allowed
OVERLAP = 0.95  # of the ten nearest: int8 keeps 0.97 with VNNI, less with AVX2 alone
NEAREST = 10
_LOAD = """
import json, sys, time
import psutil, sentence_transformers
import bertfast.saved, bertfast.dropin.sentences
import transformers.models.bert.modeling_bert
used = lambda: psutil.Process().memory_info().rss
before, start = used(), time.perf_counter()
model = bertfast.load_frozen(sys.argv[1])
seconds = time.perf_counter() - start
loaded = used()
model.encode("a text")
print(json.dumps({"seconds": seconds, "loaded": loaded - before, "called": used() - before}))
"""


def sides(stock) -> dict:
    found = {"transformers sdpa": stock, "bertfast accelerate": copy.deepcopy(stock)}
    bertfast.accelerate(found["bertfast accelerate"], strict=True)
    for precision in PRECISIONS:
        found[f"bertfast frozen, {precision}"] = bertfast.freeze(copy.deepcopy(stock), precision)
    return found


def nearest(x) -> list[set[int]]:
    """Of each of `x` [n, hidden], normalized, the others with the largest products."""
    products = x @ x.T
    np.fill_diagonal(products, -np.inf)
    return [*map(set, np.argpartition(-products, NEAREST)[:, :NEAREST])]


def held(who, expected, found, corpus=None) -> dict:
    """Agreement with the stock model's embeddings, if it is what it should be."""
    cosine = (expected * found).sum(1) / np.linalg.norm(found, axis=1)
    row = {"cosine": round(float(cosine.mean()), 6), "least": round(float(cosine.min()), 4)}
    if corpus is not None:
        both = zip(*map(nearest, corpus), strict=True)
        row["overlap_at_10"] = round(float(np.mean([len(a & b) / NEAREST for a, b in both])), 4)
    precision = who.rpartition(", ")[2]
    if row["cosine"] < COSINE.get(precision, 0.999999) or row.get("overlap_at_10", 1) < OVERLAP:
        raise SystemExit(f"{who}: {row}, expected {COSINE} and an overlap of {OVERLAP}")
    return row


def encoding(texts, corpus, rounds) -> tuple[list[dict], dict]:
    models = sides(SentenceTransformer(str(minilm()), device="cpu", local_files_only=True))
    embedded = {who: model.encode([*texts, *corpus]) for who, model in models.items()}
    expected = next(iter(embedded.values()))
    n = len(texts)
    found = {
        who: held(who, expected[:n], x[:n], (expected[n:], x[n:])) for who, x in embedded.items()
    }
    runs = {who: lambda model=model: model.encode(texts) for who, model in models.items()}
    return rows(take_turns(runs, rounds, one_openmp=True), found, n), models


def reranking(texts, rounds) -> list[dict]:
    """Of pairs; how far scores, logits of a head at random, are off, in units of their spread."""
    torch.manual_seed(0)
    models = sides(CrossEncoder(str(minilm()), device="cpu", num_labels=1, local_files_only=True))
    pairs = [*zip(texts[::2], texts[1::2], strict=False)]
    scores = {who: model.predict(pairs, activation_fn=torch.nn.Identity())
              for who, model in models.items()}  # fmt: skip
    expected = next(iter(scores.values()))
    found = {}
    for who, x in scores.items():
        error = np.sqrt(np.mean((x - expected) ** 2)) / expected.std()
        found[who] = {"error": round(float(error), 5)}
        if not error <= {"int8": 0.2, "bf16": 0.02}.get(who.rpartition(", ")[2], 1e-4):
            raise SystemExit(f"{who}: scores are off by {error:.1e} of their spread")
    runs = {who: lambda model=model: model.predict(pairs) for who, model in models.items()}
    return rows(take_turns(runs, rounds, one_openmp=True), found, len(pairs))


def rows(seconds, found, texts) -> list[dict]:
    return [
        {"name": who, "milliseconds": round(1e3 * s, 1), "texts_per_second": round(texts / s)}
        | found[who]
        for who, s in sorted(seconds.items(), key=lambda pair: pair[1])
    ]


def loading(model) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        bertfast.save_frozen(model, folder)
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        command = [sys.executable, "-c", _LOAD, folder]
        runs = [
            json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            for _ in range(3)
        ]
    median = sorted(runs, key=lambda run: run["seconds"])[1]
    return {"file_bytes": size} | median


def summary(cells) -> list[dict]:
    lines = []
    for cell in cells:
        rival = next(row for row in cell["rows"] if row["name"].startswith("transformers"))
        lines += [
            {
                "task": f"{cell['task']} ({row['name']})",
                "unit": "ms",
                "bertfast": row["milliseconds"],
                "rival": rival["milliseconds"],
                "rival_name": f"{rival['name']}, fp32",
                "ratio": round(rival["milliseconds"] / row["milliseconds"], 2),
            }
            for row in cell["rows"]
            if row is not rival
        ]
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--ranked", type=int, default=2000)
    parser.add_argument("--corpus", type=Path, metavar="FILE", help="texts to rank, a line each")
    parser.add_argument("--out", type=Path, help="folder (benchmarks/results/<device>)")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.texts < 48 or args.ranked <= NEAREST:  # fewer scores: no spread
        parser.error(f"expected --rounds 1, --texts 48 and --ranked {NEAREST + 1} or more")
    texts = sentences(args.texts + (0 if args.corpus else args.ranked))
    texts, corpus = texts[: args.texts], texts[args.texts :]
    if args.corpus:
        corpus = args.corpus.read_text(encoding="utf-8").splitlines()[: args.ranked]
    cells = []
    for kind in ("encode", "predict"):
        if kind == "encode":
            task = f"SentenceTransformer.encode, MiniLM, {len(texts)} sentences"
            timed, models = encoding(texts, corpus, args.rounds)
            loaded = loading(models["bertfast frozen, int8"])
            del models
        else:
            task = f"CrossEncoder.predict, MiniLM, {len(texts) // 2} pairs"
            timed = reranking(texts, args.rounds)
        cells.append({"task": task, "rounds": args.rounds, "rows": timed})
        print("\n" + table(task, cells[-1]), flush=True)
    print(f"\nload_frozen: {loaded}")
    result = {"cells": cells, "summary": summary(cells), "load_frozen": loaded}
    save("frozen", result | {"corpus": len(corpus)}, args.out)


if __name__ == "__main__":
    main()
