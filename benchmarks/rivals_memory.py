"""Peak memory of CPU inference beside all rivals, each in a process of its own: BERT-base, 8 x 128.

    python benchmarks/rivals_memory.py [--precisions fp32 bf16 int8] [--rivals NAME ...]

MB above what the imports take (Python, torch, transformers, bertfast): the weights as each holds
them, and what a forward needs beside them. Compiled models are left out: their compiler's memory
would be most of it. Outputs are encoder_inference.py's to check.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers
from encoder_inference import checkpoint, summary
from harness import ROOT, save
from rivals import COMPILED, OURS, RIVALS

from bertfast.bench import memory
from bertfast.bench.command import say, table
from bertfast.bench.encoder import PRECISIONS
from bertfast.bench.measure import emulated

MODEL, LENGTHS = "BERT-base", [128] * 8
KEY = "inference_peak_mb"


def measure(classes, folder, precision, config) -> list[dict]:
    sizes = (LENGTHS, max(LENGTHS), config.vocab_size)
    threads, slow = torch.get_num_threads(), emulated(precision)

    def row(cls) -> dict:
        note, found = cls.available() or (slow if cls.on_torch else None), {}
        if note is None:
            say(f"memory of {cls.name}, {precision}")
            where = [ROOT / "benchmarks"]
            try:
                found = memory.measure(cls, folder, precision, threads, *sizes, path=where)
            except RuntimeError as error:
                note = str(error)
        return {"name": cls.name, **(found or {"note": note})}

    with ThreadPoolExecutor(2) as pool:  # company changes times, not memory
        return sorted(pool.map(row, classes), key=lambda row: row.get(KEY, float("inf")))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [cls.name for cls in RIVALS if cls not in COMPILED]
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--rivals", nargs="+", choices=names, default=names)
    parser.add_argument("--out", type=Path, help="folder (benchmarks/results/<device>)")
    args = parser.parse_args(argv)
    folder, cells = checkpoint(MODEL), []
    config = transformers.BertConfig.from_pretrained(folder)
    for precision in args.precisions:
        able = [cls for cls in (*OURS, *RIVALS) if precision in cls.precisions]
        able = [cls for cls in able if cls.ours or cls.name in args.rivals]
        task = f"memory of {MODEL} inference, 8 x 128 tokens, {precision}"
        found = {"precision": precision, "task": task}
        found["rows"] = measure(able, folder, precision, config)
        print("\n" + table(task, found), flush=True)
        cells.append(found)
    save("rivals_memory", {"cells": cells, "summary": summary(cells, KEY, "MB")}, args.out)


if __name__ == "__main__":
    main()
