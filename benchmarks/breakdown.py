"""One encoder layer by operator: bertfast's kernels beside plain PyTorch on padded tensors.

    python benchmarks/breakdown.py [--precisions fp32 bf16] [--rounds 5]

Each operator is held against its reference in fp64, then both take turns with torch's product and
copy, which are the roofs: an operator needs at least flop / product's rate and bytes / copy's rate
(its inputs, weights and outputs, each moved once). "training" is forward and backward. A precision
that torch emulates on this CPU is left out.
"""

from encoder_inference import WORKLOADS
from harness import arguments, save, torch_runs
from transformers import BertConfig

from bertfast.bench import ops
from bertfast.bench.command import say

LAYER = {"qkv_linear": 1, "attention": 1, "linear": 1, "add_layer_norm": 2, "feed_forward": 1}
MINILM = BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6)
MODELS = {  # title: configuration, lengths
    "MiniLM, 32 natural-length sentences": (MINILM, WORKLOADS["minilm-natural"][2]),
    "BERT-base, 8 x 128 tokens": (BertConfig(), [128] * 8),
}


def part(operator, step, precision, shape, rounds) -> dict:
    """Milliseconds of all of an operator's uses in a layer, and the roof's."""
    found = ops.cell(operator, step, precision, ["cpu", ops.PLAIN], shape, rounds)
    rows, uses = {row["name"]: row for row in found["rows"]}, LAYER[operator]
    missing = [row["note"] for row in rows.values() if "note" in row]
    if missing:
        raise SystemExit(missing[0])
    products = found["flop"] / found["matmul_peak_gflops"] / 1e6
    memory = found["bytes"] / found["copy_gb_per_second"] / 1e6
    return {
        "operator": operator,
        "uses": uses,
        "gflop": round(uses * found["flop"] / 1e9, 4),
        "mb": round(uses * found["bytes"] / 1e6, 3),
        "matmul_peak_gflops": found["matmul_peak_gflops"],
        "copy_gb_per_second": found["copy_gb_per_second"],
        "roof": "products" if products > memory else "memory",
        "roof_ms": round(uses * max(products, memory), 4),
        "bertfast_ms": round(uses * rows["cpu"]["milliseconds"], 4),
        "torch_ms": round(uses * rows[ops.PLAIN]["milliseconds"], 4),
        "max_error": rows["cpu"]["max_error"],
    }


def main(argv=None):
    args = arguments(__doc__).parse_args(argv)
    cells, summary = [], []
    precisions = torch_runs(args.precisions)
    for title, (config, lengths) in MODELS.items():
        shape = ops.Shape.of(config, lengths)
        for step in ops.STEPS:
            for precision in precisions:
                task = f"a layer of {title}, {step}, {precision}"
                say(task)
                parts = [part(name, step, precision, shape, args.rounds) for name in LAYER]
                ours, theirs = (
                    round(sum(p[key] for p in parts), 3) for key in ("bertfast_ms", "torch_ms")
                )
                padded = len(lengths) * max(lengths)
                cells.append(
                    {
                        **{"task": task, "model": title, "step": step, "precision": precision},
                        **{"tokens": shape.tokens, "padded_tokens": padded, "parts": parts},
                    }
                )
                row = {"task": task, "unit": "ms", "bertfast": ours, "rival": theirs}
                row |= {"rival_name": "PyTorch, padded", "ratio": round(theirs / ours, 3)}
                summary.append(row)
                print(f"{task}: {ours} ms, PyTorch {theirs} ms", flush=True)
    save("breakdown", {"cells": cells, "summary": summary}, args.out)


if __name__ == "__main__":
    main()
