"""CPU inference of the encoder: bertfast beside its rivals, over workloads and precisions.

    python benchmarks/encoder_inference.py [--workloads W ...] [--precisions P ...] [--threads N]

A cell is one workload in one precision. Its rivals take turns in one run, after their outputs were
held against transformers in fp32; a time is the median over the rounds, each of which runs all of
the workload's batches (several, since one's longest sentence decides how much of it is padding).
Measured cells are put into the result's file beside those that the same commit measured before.
The first run also exports the models, into build/rivals.
"""

import argparse
import gc
import math
import time
from pathlib import Path

import torch
import transformers
from harness import interleave, load, median, minilm, natural_lengths, origin, real_batch, save
from rivals import OURS, RIVALS
from rivals.export import BUILD

PRECISIONS = ("fp32", "bf16", "int8")
# Least cosine of mean-pooled sentences to fp32's: what our int8 promises, and of rivals sense.
COSINE = {"fp32": 0.99999, "bf16": 0.999, "int8": 0.9}
OURS_COSINE = COSINE | {"int8": 0.998}
WORKLOADS = {  # name: model, title, the batches' lengths
    "minilm-natural": (
        "MiniLM",
        "32 natural-length sentences",
        [natural_lengths(32, seed) for seed in range(4)],
    ),
    "minilm-1x32": ("MiniLM", "1 x 32 tokens", [[32]]),
    "base-natural": (
        "BERT-base",
        "16 natural-length sentences",
        [natural_lengths(16, seed) for seed in range(2)],
    ),
    "base-1x512": ("BERT-base", "1 x 512 tokens", [[512]]),
    "base-8x128": ("BERT-base", "8 x 128 tokens", [[128] * 8]),
}


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


def useful_flop(config, lengths: list[int]) -> int:
    """Operations of the encoder's products, a multiply-add being two, over real tokens only."""
    hidden, tokens = config.hidden_size, sum(lengths)
    linears = 2 * tokens * (4 * hidden**2 + 2 * hidden * config.intermediate_size)
    attention = 2 * 2 * hidden * sum(n * n for n in lengths)
    return config.num_hidden_layers * (linears + attention)


def product(precision: str):
    """torch's own 3072 x 3072 product, the yardstick of `share_of_peak`, and its operations. In
    int8 it is no ceiling: weights that are packed already can pass it."""
    if precision == "int8":
        a, b = torch.randint(-127, 128, (2, 3072, 3072), dtype=torch.int8).unbind()
        return lambda: torch._int_mm(a, b), 2 * 3072**3
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(2, 3072, 3072).to(dtype).unbind()
    return lambda: a @ b, 2 * 3072**3


def agreement(run, batches, expected) -> dict:
    """Largest error over real tokens, mean and least cosine of mean-pooled sentences."""
    error, cosines = 0.0, []
    for batch, states in zip(batches, expected, strict=True):
        out, real = run(batch).float(), batch["attention_mask"].bool()
        error = max(error, (out - states)[real].abs().nan_to_num(math.inf).max().item())
        pooled = [x.masked_fill(~real[..., None], 0).sum(1) for x in (out, states)]
        cosines.append(torch.cosine_similarity(*pooled))
    cosines = torch.cat(cosines)
    return {
        "max_error": float(f"{error:.2e}"),
        "cosine": round(cosines.mean().item(), 6),
        "least_cosine": round(cosines.min().item(), 6),
    }


def wrong(cls, precision, found) -> str | None:
    bounds = OURS_COSINE if cls in OURS else COSINE
    if precision == "fp32" and not found["max_error"] <= cls.tolerance:
        return f"outputs differ by {found['max_error']}, more than {cls.tolerance}"
    if not found["cosine"] >= bounds[precision]:
        return f"cosine {found['cosine']} to fp32, less than {bounds[precision]}"
    return None


def burst(run, batches, seconds):
    """`run` over all batches, as often as fills `seconds`; and how often that is."""
    start = time.perf_counter()
    for batch in batches:
        run(batch)
    count = max(1, round(seconds / (time.perf_counter() - start)))

    def repeat():
        for _ in range(count):
            for batch in batches:
                run(batch)

    return repeat, count


def build(classes, folder, precision, threads):
    """The rivals that can run here, and rows for those that can't."""
    rivals, rows = {}, []
    for cls in classes:
        if precision in cls.precisions:
            reason = cls.available()
            if reason:
                rows.append({"name": cls.name, "note": reason})
            else:
                rivals[cls] = cls(folder, precision, threads)
    return rivals, rows


def measure(rivals, rows, batches, expected, precision, lengths, config, rounds) -> dict:
    """A cell: every rival checked, then timed."""
    runs, counts, found, rows = {}, {}, {}, list(rows)
    for cls, rival in rivals.items():
        found[cls.name] = agreement(rival, batches, expected)
        note = wrong(cls, precision, found[cls.name])
        if note and cls in OURS:
            raise SystemExit(f"{cls.name}, {precision}: {note}")
        if note:
            rows.append({"name": cls.name, "note": note, **found[cls.name]})
        else:
            runs[cls.name], counts[cls.name] = burst(rival, batches, 0.1)
    multiply, flop = product(precision)
    runs["product"], counts["product"] = multiply, 1
    seconds = {
        name: median(s) / counts[name]
        for name, s in interleave(runs, rounds, warmup=1, pause=0.02).items()
    }
    peak = flop / seconds.pop("product")
    tokens, flop = sum(map(sum, lengths)), sum(useful_flop(config, drawn) for drawn in lengths)
    ours = min(seconds[cls.name] for cls in rivals if cls in OURS)
    timed = [
        {
            "name": name,
            "milliseconds": round(1e3 * t / len(batches), 4),
            "tokens_per_second": round(tokens / t),
            "useful_gflops": round(flop / t / 1e9, 1),
            "share_of_peak": round(flop / t / peak, 3),
            "bertfast_speedup": round(t / ours, 3),
            **found[name],
        }
        for name, t in sorted(seconds.items(), key=lambda pair: pair[1])
    ]
    padded = sum(batch["input_ids"].numel() for batch in batches)
    return {
        "batches": len(batches),
        "tokens": tokens,
        "padded_tokens": padded,
        "rounds": rounds,
        "matmul_peak_gflops": round(peak / 1e9, 1),
        "rows": timed + rows,
    }


def show(cell):
    print(
        f"\n{cell['task']}: {cell['tokens']} tokens in {cell['padded_tokens']}, "
        f"product at {cell['matmul_peak_gflops']:.0f} GFLOP/s"
    )
    for row in cell["rows"]:
        if "milliseconds" in row:
            print(
                "{name:22} {milliseconds:9.3f} ms {tokens_per_second:8} tokens/s "
                "{useful_gflops:7.1f} GFLOP/s {share_of_peak:5.0%} of peak, bertfast is "
                "{bertfast_speedup:6.2f}x, error {max_error:.1e}, cosine {cosine:.5f}".format(**row)
            )
        else:
            print(f"{row['name']:22} {row['note']}")


def summary(cells) -> list[dict]:
    """One row a cell: our best beside the best rival."""
    rows, ours = [], {cls.name for cls in OURS}
    for cell in cells:
        timed = [row for row in cell["rows"] if "milliseconds" in row]
        best = [[r for r in timed if (r["name"] in ours) == mine][:1] for mine in (True, False)]
        if all(best):
            (mine,), (rival,) = best
            rows.append(
                {
                    "task": cell["task"],
                    "unit": "ms",
                    "bertfast": mine["milliseconds"],
                    "rival": rival["milliseconds"],
                    "rival_name": rival["name"],
                    "ratio": round(rival["milliseconds"] / mine["milliseconds"], 3),
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
    parser.add_argument("--rivals", nargs="+", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="folder (benchmarks/results/<device>)")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.threads < 1:
        parser.error(f"--rounds {args.rounds} --threads {args.threads}: expected 1 or more each")
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    classes, cells = [*OURS, *(cls for cls in RIVALS if cls.name in args.rivals)], []
    models = {}  # name: its workloads
    for workload in args.workloads:
        models.setdefault(WORKLOADS[workload][0], []).append(workload)
    for model, workloads in models.items():
        folder = checkpoint(model)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        reference = transformers.BertModel.from_pretrained(folder).eval()
        batches = {w: [real_batch(tokenizer, n) for n in WORKLOADS[w][2]] for w in workloads}
        expected = {w: [reference(**b).last_hidden_state for b in batches[w]] for w in workloads}
        for precision in args.precisions:
            rivals, rows = build(classes, folder, precision, args.threads)
            for w in workloads:
                cell = {
                    "workload": w,
                    "precision": precision,
                    "task": f"{model} inference, {WORKLOADS[w][1]}, {precision}",
                    **measure(
                        *(rivals, rows, batches[w], expected[w], precision),
                        *(WORKLOADS[w][2], reference.config, args.rounds),
                    ),
                }
                show(cell)
                cells.append(cell)
            del rivals
            gc.collect()
    merge(cells, args.out)


if __name__ == "__main__":
    main()
