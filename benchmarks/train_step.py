"""A training step on the CPU beside transformers': forward, backward and fused AdamW.

    python benchmarks/train_step.py [--precisions fp32 bf16] [--rounds 3]

MiniLM with a classifier on 32 sentences of natural lengths, and BERT-base with its language model's
head, 15% of the tokens labelled, on 4 x 128. Gradients are compared with fp32's first, dropout off.
bf16 is autocast over fp32 weights.
"""

import argparse
from pathlib import Path

import transformers
from harness import minilm, save

from bertfast.bench import train
from bertfast.bench.command import say, table
from bertfast.bench.measure import natural_lengths, random_batch

WORKLOADS = {  # title: the task, the lengths, the implementations
    "MiniLM, classifier, 32 natural-length sentences": (
        *("classify", natural_lengths(32)),
        ("bertfast", "dropin", "sdpa", "eager"),
    ),
    "BERT-base, masked LM, 4 x 128 tokens": ("mlm", [128] * 4, ("bertfast", "dropin", "sdpa")),
}


def reference(title, task):
    cls = getattr(transformers, train.TASKS[task])
    if title.startswith("MiniLM"):
        return cls.from_pretrained(minilm()).eval()
    return cls(transformers.BertConfig()).eval()


def summary(cells) -> list[dict]:
    """Our best beside transformers with SDPA."""
    rows = []
    for found in cells:
        times = {row["name"]: row.get("milliseconds") for row in found["rows"]}
        ours = min(t for name, t in times.items() if t and name.startswith("bertfast"))
        rival = times[train.IMPLEMENTATIONS["sdpa"]]
        row = {"task": found["task"], "unit": "ms", "bertfast": ours, "rival": rival}
        row |= {"rival_name": "transformers sdpa", "ratio": round(rival / ours, 3)}
        rows.append(row)
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    precisions = train.PRECISIONS
    parser.add_argument("--precisions", nargs="+", choices=precisions, default=precisions)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder (benchmarks/results/<device>)")
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    cells = []
    for title, (task, lengths, implementations) in WORKLOADS.items():
        transformers.set_seed(0)
        model = reference(title, task)
        batch = random_batch(lengths, max(lengths), model.config.vocab_size)
        batch["labels"] = train.labels_of(task, batch, model.config.vocab_size)
        for precision in args.precisions:
            name = f"training step of {title}, {precision}"
            found = {"task": name, "precision": precision}
            found |= train.cell(model, task, implementations, batch, precision, args.rounds, say)
            print("\n" + table(name, found), flush=True)
            cells.append(found)
    save("train_step", {"cells": cells, "summary": summary(cells)}, args.out)


if __name__ == "__main__":
    main()
