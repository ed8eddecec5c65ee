"""CPU inference in fp32: bertfast beside its rivals on padded batches of natural-length text.

    python benchmarks/encoder_inference.py [--compile] [--rounds 10]

The rivals take turns in one run, after their outputs were checked; a time is the median over the
rounds, each of which runs all batches. Several batches, since one's longest sentence decides how
much of it is padding.
"""

import argparse
from pathlib import Path

import torch
import transformers
from harness import interleave, median, minilm, natural_lengths, real_batch, save
from onednn_encoder import Encoder

import bertfast

TOLERANCE = 2e-5  # of last_hidden_state on real tokens, against transformers


def useful_flop(config, lengths: list[int]) -> int:
    """Floating-point operations of the encoder's products over real tokens only."""
    hidden, tokens = config.hidden_size, sum(lengths)
    linears = 2 * tokens * (4 * hidden**2 + 2 * hidden * config.intermediate_size)
    attention = 2 * 2 * hidden * sum(n * n for n in lengths)
    return config.num_hidden_layers * (linears + attention)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=minilm(), help="a BERT checkpoint's folder")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the first batch's lengths")
    parser.add_argument("--compile", action="store_true", help="add torch.compile'd transformers")
    parser.add_argument("--out", type=Path, help="folder (benchmarks/results/<device>)")
    args = parser.parse_args()

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    seeds = range(args.seed, args.seed + args.batches)
    lengths = [natural_lengths(args.batch_size, seed) for seed in seeds]
    batches = [real_batch(tokenizer, drawn) for drawn in lengths]
    tokens = sum(map(sum, lengths))
    stock = {
        name: transformers.BertModel.from_pretrained(args.model, attn_implementation=name).eval()
        for name in ("sdpa", "eager")
    }
    ours = bertfast.BertModel.from_pretrained(args.model).eval()
    onednn = Encoder(stock["sdpa"], tokens // args.batches)
    models = {
        "bertfast": lambda b: ours(**b).last_hidden_state,
        "transformers sdpa": lambda b: stock["sdpa"](**b).last_hidden_state,
        "transformers eager": lambda b: stock["eager"](**b).last_hidden_state,
        "oneDNN packed": lambda b: onednn(**b),
    }
    if args.compile:
        compiled = torch.compile(stock["sdpa"])
        models["transformers compiled"] = lambda b: compiled(**b).last_hidden_state

    with torch.inference_mode():
        errors = dict.fromkeys(models, 0.0)
        for b in batches:
            real = b["attention_mask"].bool()
            expected = models["transformers sdpa"](b)[real]
            for name, run in models.items():
                error = (run(b)[real] - expected).abs().max().item()
                errors[name] = max(errors[name], error)
        wrong = {name: error for name, error in errors.items() if not error < TOLERANCE}
        if wrong:
            raise SystemExit(f"outputs differ from transformers by more than {TOLERANCE}: {wrong}")

        # The machine's fp32 peak, as far as torch's best product reaches it.
        a, b = torch.randn(2, 3072, 3072).unbind()
        rivals = {n: lambda run=run: [run(b) for b in batches] for n, run in models.items()}
        rivals["matmul 3072"] = lambda: a @ b
        seconds = {n: median(s) for n, s in interleave(rivals, args.rounds).items()}

    peak = 2 * 3072**3 / seconds.pop("matmul 3072") / 1e9
    flop = sum(useful_flop(ours.config, drawn) for drawn in lengths)
    rows = [
        {
            "name": name,
            "milliseconds": round(1e3 * t / args.batches, 3),
            "useful_gflops": round(flop / t / 1e9, 1),
            "bertfast_speedup": round(t / seconds["bertfast"], 2),
            "max_error": errors[name],
        }
        for name, t in seconds.items()
    ]
    for row in rows:
        print(
            "{name:22} {milliseconds:9.2f} ms  {useful_gflops:6.1f} GFLOP/s".format(**row), end=""
        )
        print("  bertfast is {bertfast_speedup:5.2f}x, error {max_error:.1e}".format(**row))
    print(f"fp32 peak by torch's matmul: {peak:.0f} GFLOP/s")
    settings = {
        "model": Path(args.model).parent.name,
        "precision": "fp32",
        "batch": args.batch_size,
        "batches": args.batches,
        "tokens": tokens,
        "padded_tokens": sum(b["input_ids"].numel() for b in batches),
        "rounds": args.rounds,
        "seed": args.seed,
    }
    summary = [
        {
            "task": f"MiniLM inference, fp32, {args.batch_size} natural-length sentences",
            "unit": "ms",
            "bertfast": rows[0]["milliseconds"],
            "rival": row["milliseconds"],
            "rival_name": row["name"],
            "ratio": row["bertfast_speedup"],
        }
        for row in rows[1:]
    ]
    result = {"settings": settings, "matmul_peak_gflops": round(peak, 1), "rows": rows}
    save("encoder_inference", {**result, "summary": summary}, args.out)


if __name__ == "__main__":
    main()
