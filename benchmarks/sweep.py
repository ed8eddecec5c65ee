"""Useful tokens/s of MiniLM against length and against padding, bertfast beside two rivals.

    python benchmarks/sweep.py [--precisions fp32 bf16] [--rounds 5]

Lengths: full rows, 512 tokens in each batch. Padding: 16 rows of at most 128 tokens, a growing
share of whose positions is padding. Outputs are checked in the same run. A precision that torch
emulates on this CPU is left out.
"""

import torch
import transformers
from harness import arguments, minilm, save, torch_runs
from rivals import Frozen, OneDnn, Sdpa

from bertfast.bench.command import say, table
from bertfast.bench.encoder import build, cell
from bertfast.bench.measure import padded_lengths, random_batch

TOKENS = 512
LENGTHS = (16, 32, 64, 128, 256, 512)
PADDING = (0.0, 0.25, 0.5, 0.75)
ROWS, LONGEST = 16, 128


def shapes():
    """(axis, value, title, lengths, seqlen)"""
    for n in LENGTHS:
        yield "length", n, f"{TOKENS // n} x {n} tokens", [n] * (TOKENS // n), n
    for ratio in PADDING:
        title = f"{ROWS} x {LONGEST}, {ratio:.0%} padding"
        yield "padding", ratio, title, padded_lengths(ROWS, LONGEST, ratio), LONGEST


def summary(cells) -> list[dict]:
    """The most padding, in each precision, beside transformers."""
    rows = []
    for found in cells:
        times = {row["name"]: row.get("milliseconds") for row in found["rows"]}
        ours, rival = times.get(Frozen.name), times.get(Sdpa.name)
        if found["value"] == PADDING[-1] and ours and rival:
            row = {"task": found["task"], "unit": "ms", "bertfast": ours, "rival": rival}
            rows.append(row | {"rival_name": Sdpa.name, "ratio": round(rival / ours, 3)})
    return rows


@torch.inference_mode()
def main(argv=None):
    args = arguments(__doc__).parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder, threads, cells = minilm(), torch.get_num_threads(), []
    reference = transformers.BertModel.from_pretrained(folder).eval()
    for precision in torch_runs(args.precisions):
        rivals, rows = build((Frozen, Sdpa, OneDnn), folder, precision, threads, say=say)
        for axis, value, title, lengths, seqlen in shapes():
            batch = random_batch(lengths, seqlen, reference.config.vocab_size)
            expected = [reference(**batch).last_hidden_state]
            task = f"MiniLM inference, {title}, {precision}"
            found = {"axis": axis, "value": value, "precision": precision, "task": task}
            found |= cell(rivals, rows, [batch], expected, precision, reference.config, args.rounds)
            print("\n" + table(task, found), flush=True)
            cells.append(found)
    save("sweep", {"cells": cells, "summary": summary(cells)}, args.out)


if __name__ == "__main__":
    main()
