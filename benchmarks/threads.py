"""CPU inference over 1 to all threads: how bertfast and transformers scale, in about a minute.

    python benchmarks/threads.py [--threads 1 2 4 ...] [--seconds 60] [--out FOLDER]

Random weights and ids, so that it needs no file (a GPU machine's processor is measured so, at the
end of gpu_run.py). Outputs are held against transformers in fp32 at every count of threads, then
all take turns.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
import transformers
from harness import save
from rivals import OURS, Sdpa

from bertfast.bench.command import say, table
from bertfast.bench.encoder import build, cell
from bertfast.bench.measure import natural_lengths, random_batch

SMALL = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}
WORKLOADS = {  # title: configuration, lengths in tokens; what tells most first
    "BERT-base, 8 x 128 tokens": ({}, [128] * 8),
    "MiniLM's size, 1 x 32 tokens": (SMALL, [32]),
    "MiniLM's size, 32 natural-length sequences": (SMALL, natural_lengths(32)),
}


def counts(most: int) -> list[int]:
    return [*(1 << i for i in range(most.bit_length()) if 1 << i < most), most]


@torch.inference_mode()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    most = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", nargs="+", type=int, default=counts(most), metavar="N")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "int8"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60, help="after which no cell begins")
    parser.add_argument("--out", type=Path, help="folder (benchmarks/results/<device>)")
    args = parser.parse_args(argv)
    if min(args.threads) < 1 or args.rounds < 1:
        parser.error(f"--threads {args.threads} --rounds {args.rounds}: expected 1 or more each")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(max(args.threads))
    end, cells = time.monotonic() + args.seconds, []
    for title, (sizes, lengths) in WORKLOADS.items():
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            reference = transformers.BertModel(transformers.BertConfig(**sizes)).eval()
            reference.save_pretrained(folder)
            batch = random_batch(lengths, max(lengths), reference.config.vocab_size)
            expected = reference(**batch).last_hidden_state
            for precision in args.precisions:
                rivals, rows = build([*OURS, Sdpa], folder, precision, max(args.threads))
                for threads in reversed(args.threads):  # few threads take longest
                    if time.monotonic() > end:
                        say(f"{title}, {precision}: no time for {threads} threads")
                        break
                    torch.set_num_threads(threads)
                    task = f"{title}, {precision}, {threads} threads"
                    found = {"task": task, "workload": [title, precision], "threads": threads}
                    found |= cell(
                        *(rivals, rows, [batch], [expected], precision),
                        *(reference.config, args.rounds),
                    )
                    cells.append(found)
                    print("\n" + table(task, found), flush=True)
    scaling(cells)
    torch.set_num_threads(max(args.threads))  # whose results these stand among
    save("threads", {"cells": cells, "summary": summary(cells)}, args.out)


def scaling(cells):
    """Adds to each row how many times as fast it is as one thread, where that was measured."""
    key = lambda cell, row: (*cell["workload"], row["name"])
    timed = [(c, row) for c in cells for row in c["rows"] if "milliseconds" in row]
    alone = {key(c, row): row["milliseconds"] for c, row in timed if c["threads"] == 1}
    for c, row in timed:
        if key(c, row) in alone:
            row["scaling"] = round(alone[key(c, row)] / row["milliseconds"], 2)


def summary(cells) -> list[dict]:
    """Of each workload the most threads beside one, the fastest of ours."""
    rows, most = [], max(c["threads"] for c in cells)
    named = {(*c["workload"], c["threads"], r["name"]): r for c in cells for r in c["rows"]}
    for c in cells:
        ours = [r for r in c["rows"] if r["name"].startswith("bertfast") and "scaling" in r]
        if c["threads"] == most > 1 and ours:
            best = min(ours, key=lambda r: r["milliseconds"])
            task = f"{', '.join(c['workload'])}: {most} threads beside one ({best['name']})"
            row = {"task": task, "unit": "ms", "bertfast": best["milliseconds"]}
            alone = named[(*c["workload"], 1, best["name"])]["milliseconds"]
            row |= {"rival": alone, "rival_name": "one thread"}
            rows.append(row | {"ratio": round(alone / best["milliseconds"], 3)})
    return rows


if __name__ == "__main__":
    main()
