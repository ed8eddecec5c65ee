"""Pseudo-log-likelihoods of pairs of sentences, as `bertfast audit pairs` scores them, on a CPU.

    python benchmarks/audit.py [--pairs 40] [--rounds 3]

MiniLM's encoder with a masked language model's head of random weights, over pairs of sentences of
the standard library's docstrings that differ in a word: each token is masked once. Beside it
transformers' model with SDPA, one variant a call as the script of CrowS-Pairs has it, and with all
variants of a sentence as one batch, which needs no padding. All scores are held to the first one's.
"""

import argparse
import random
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from dropin import sentences
from harness import interleave, median, minilm, save

from bertfast.audit.likelihood import MaskedLM
from bertfast.bench.command import table
from bertfast.train.opening import quiet

OURS = "bertfast, packed"
LOOP, BATCH = "transformers sdpa, one variant a call", "transformers sdpa, a batch a sentence"
WITHIN = 1e-4  # of a token's log-probability


def checkpoint(folder) -> None:
    """MiniLM with a head for masked tokens, its decoder tied to the embeddings."""
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM.from_pretrained(minilm())
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(minilm()).save_pretrained(folder)


def texts(pairs: int) -> list[str]:
    """Sentences of 6 to 25 words, then the same with a word that another one has in its place."""
    found = [s for s in sentences(40 * pairs) if 6 <= len(s.split()) <= 25][:pairs]
    if len(found) < pairs:
        raise SystemExit(f"--pairs is {pairs}, there are {len(found)} sentences")
    r, others = random.Random(0), []
    for sentence in found:
        words = sentence.split()
        words[r.randrange(len(words))] = r.choice(r.choice(found).split())
        others.append(" ".join(words))
    return found + others


@torch.inference_mode()
def stock(model, rows, places, mask: int, single: bool) -> list[np.ndarray]:
    """Of each row the log-probabilities of the tokens at its places."""
    found = []
    for row, own in zip(rows, places, strict=True):
        ids, own = torch.tensor(row["input_ids"]), torch.tensor(own)
        variants = ids.repeat(len(own), 1)
        variants[torch.arange(len(own)), own] = mask
        scores = []
        size = 1 if single else len(own)
        for given, at in zip(variants.split(size), own.split(size), strict=True):
            logits = model(input_ids=given).logits[torch.arange(len(at)), at].log_softmax(1)
            scores.append(logits[torch.arange(len(at)), ids[at]])
        found.append(torch.cat(scores).double().numpy())
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder (benchmarks/results/<device>)")
    args = parser.parse_args(argv)
    if args.pairs < 1 or args.rounds < 1:
        parser.error("expected --pairs and --rounds of 1 or more")
    with tempfile.TemporaryDirectory() as folder:
        with quiet():
            checkpoint(folder)
            model = transformers.BertForMaskedLM.from_pretrained(folder, attn_implementation="sdpa")
        ours = MaskedLM(folder, device="cpu")
    model.eval()
    rows = ours.encoded(texts(args.pairs), str)
    places = [ours.own(row) for row in rows]
    given = model, rows, places, ours.tokenizer.mask_token_id
    runs = {
        OURS: lambda: ours.log_probabilities(rows, places),
        LOOP: lambda: stock(*given, single=True),
        BATCH: lambda: stock(*given, single=False),
    }
    scores = {name: np.concatenate(run()) for name, run in runs.items()}
    error = {name: float(abs(found - scores[LOOP]).max()) for name, found in scores.items()}
    if not max(error.values()) <= WITHIN:
        raise SystemExit(f"log-probabilities differ by {error}, expected {WITHIN} at most")
    seconds = {name: median(s) for name, s in interleave(runs, args.rounds, warmup=0).items()}
    variants = sum(map(len, places))
    task = f"pseudo-log-likelihoods, MiniLM, {2 * args.pairs} sentences, {variants} masked variants"
    found = [
        {"name": name, "milliseconds": round(1e3 * s, 1), "max_error": error[name]}
        for name, s in sorted(seconds.items(), key=lambda pair: pair[1])
    ]
    cell = {"task": task, "rounds": args.rounds, "rows": found}
    print("\n" + table(task, cell), flush=True)
    times = {row["name"]: row["milliseconds"] for row in found}
    summary = [
        {
            "task": f"{task}, fp32",
            "unit": "ms",
            "bertfast": times[OURS],
            "rival": times[rival],
            "rival_name": rival,
            "ratio": round(times[rival] / times[OURS], 2),
        }
        for rival in (LOOP, BATCH)
    ]
    tokens = sum(len(row["input_ids"]) * len(own) for row, own in zip(rows, places, strict=True))
    save("audit", {"cells": [cell], "summary": summary, "tokens": tokens}, args.out)


if __name__ == "__main__":
    main()
