"""CPU inference of the encoder: bertfast beside its rivals, over workloads and precisions.

    python benchmarks/encoder_inference.py [--workloads W ...] [--precisions P ...] [--threads N]

A cell is one workload in one precision. Its rivals take turns in one run, after their outputs were
held against transformers in fp32; a time is the median over the rounds. Measured cells are put into
the result's file beside those that the same commit measured before. The first run also exports the
models, into build/rivals.
"""

import argparse
import gc
from pathlib import Path

import torch
import transformers
from harness import load, minilm, real_batch, save
from rivals import COMPILED, OURS, RIVALS, Eager
from rivals.export import BUILD

from bertfast.bench.command import say, table
from bertfast.bench.encoder import PRECISIONS, build, cell
from bertfast.bench.measure import natural_lengths, origin
from bertfast.bench.parts import layer_parts

WORKLOADS = {  # name: model, title, lengths in tokens
    "minilm-natural": ("MiniLM", "32 natural-length sentences", natural_lengths(32)),
    "minilm-1x32": ("MiniLM", "1 x 32 tokens", [32]),
    "base-natural": ("BERT-base", "16 natural-length sentences", natural_lengths(16)),
    "base-1x512": ("BERT-base", "1 x 512 tokens", [512]),
    "base-8x128": ("BERT-base", "8 x 128 tokens", [128] * 8),
}
PROMISED = 0.998  # our int8's mean-pooled cosine on real text


def checkpoint(model: str) -> str:
    """MiniLM's folder, or BERT-base with random weights (and MiniLM's tokenizer), made once."""
    if model == "MiniLM":
        return minilm()
    folder = BUILD / "bert-base"
    if not (folder / "model.safetensors").exists():
        transformers.AutoTokenizer.from_pretrained(minilm()).save_pretrained(folder)
        torch.manual_seed(0)
        transformers.BertModel(transformers.BertConfig()).save_pretrained(folder)
    return str(folder)


def summary(cells, key="milliseconds", unit="ms") -> list[dict]:
    """One row a cell: our best beside the best rival, of rows that are sorted by `key`."""
    rows, ours = [], {cls.name for cls in OURS}
    for found in cells:
        done = [row for row in found["rows"] if key in row]
        best = [[r for r in done if (r["name"] in ours) == mine][:1] for mine in (True, False)]
        if all(best):
            (mine,), (rival,) = best
            rows.append(
                {
                    "task": found["task"],
                    "unit": unit,
                    "bertfast": mine[key],
                    "rival": rival[key],
                    "rival_name": rival["name"],
                    "ratio": round(rival[key] / mine[key], 3),
                }
            )
    return rows


def merge(cells, folder):
    """Saves `cells` with those that the same commit measured before, in the table's order."""
    before = load("encoder_inference", folder)
    kept = {}
    if before and before["commit"] == origin()["commit"]:
        kept = {(c["workload"], c["precision"]): c for c in before["cells"]}
    kept |= {(c["workload"], c["precision"]): c for c in cells}
    cells = [kept[w, p] for w in WORKLOADS for p in PRECISIONS if (w, p) in kept]
    return save("encoder_inference", {"cells": cells, "summary": summary(cells)}, folder)


@torch.inference_mode()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [cls.name for cls in RIVALS]
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    text = "(default: all; for BERT-base without eager and the compiled, to save minutes)"
    parser.add_argument("--rivals", nargs="+", choices=names, help=text)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="folder (benchmarks/results/<device>)")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.threads < 1:
        parser.error(f"--rounds {args.rounds} --threads {args.threads}: expected 1 or more each")
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    cells = []
    models = {}  # name: its workloads
    for workload in args.workloads:
        models.setdefault(WORKLOADS[workload][0], []).append(workload)
    for model, workloads in models.items():
        folder = checkpoint(model)
        wanted = args.rivals or [
            cls.name for cls in RIVALS if model != "BERT-base" or cls not in (Eager, *COMPILED)
        ]
        classes = [*OURS, *(cls for cls in RIVALS if cls.name in wanted)]
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        reference = transformers.BertModel.from_pretrained(folder).eval()
        batches = {w: [real_batch(tokenizer, WORKLOADS[w][2])] for w in workloads}
        expected = {w: [reference(**b).last_hidden_state for b in batches[w]] for w in workloads}
        for precision in args.precisions:
            able = [cls for cls in classes if precision in cls.precisions]
            rivals, rows = build(able, folder, precision, args.threads, say=say)
            for w in workloads:
                task = f"{model} inference, {WORKLOADS[w][1]}, {precision}"
                found = {
                    "workload": w,
                    "precision": precision,
                    "task": task,
                    **cell(
                        *(rivals, rows, batches[w], expected[w], precision),
                        *(reference.config, args.rounds),
                    ),
                }
                found["parts"] = {
                    cls.name: layer_parts(
                        lambda rival=rival: rival(batches[w][0]),
                        *(reference.config, WORKLOADS[w][2], precision),
                    )
                    for cls, rival in rivals.items()
                    if cls in OURS
                }
                print("\n" + table(task, found), flush=True)
                for row in found["rows"]:
                    mine = row["name"] in {cls.name for cls in OURS}
                    if mine and row.get("cosine", 1) < PROMISED:
                        raise SystemExit(f"{row['name']}: cosine {row['cosine']}, not {PROMISED}")
                cells.append(found)
            del rivals
            gc.collect()
    merge(cells, args.out)


if __name__ == "__main__":
    main()
