"""A CPU training step, bertfast beside transformers with SDPA, in fp32 and bf16; bf16's loss curve.

    python benchmarks/training_step.py [--workloads W ...] [--precisions P ...] [--threads N]
        [--rounds 5] [--curve 200]

A step is forward, loss, backward, clipping and fused AdamW, with dropout 0.1; bf16 is torch's
autocast on both sides, over fp32 weights. Both start from equal weights (BERT-base: random ones)
and first train some steps without dropout, whose losses must agree; then they take turns. Useful
operations are those of the encoder's products over real tokens, three times the forward's.

`--curve N`: MiniLM learns masked words of real text for N steps, in fp32, in bf16, and in fp32
with other dropout masks. bf16's smoothed loss may not depart from fp32's further than that of the
other masks does.
"""

import argparse
import gc
import warnings
from pathlib import Path

import torch
import transformers
from harness import interleave, median, minilm, natural_lengths, real_batch, save

import bertfast
from bertfast.bench.measure import emulated, encoder_flop
from bertfast.train.optimizer import parameter_groups

PRECISIONS = ("fp32", "bf16")
LABELS = 4
CHECKED = 2  # steps whose losses must agree
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}  # of losses, relative
NATURAL = natural_lengths(16)
WORKLOADS = {  # name: model, title, lengths in tokens
    "base-8x128": ("BERT-base", "8 x 128 tokens", [128] * 8),
    "base-natural": ("BERT-base", "16 natural-length sequences", NATURAL),
    "minilm-8x128": ("MiniLM", "8 x 128 tokens", [128] * 8),
    "minilm-natural": ("MiniLM", "16 natural-length sequences", NATURAL),
}
SMOOTHED = 20  # steps in a mean of the curve
MASKED = 0.15
PIECES = 100  # batches that the text is long enough for


def models(name: str) -> dict:
    """The classifier of transformers and ours, with equal weights."""
    if name == "MiniLM":
        theirs = transformers.BertForSequenceClassification.from_pretrained(
            minilm(), num_labels=LABELS, attn_implementation="sdpa"
        )
    else:
        torch.manual_seed(0)
        theirs = transformers.BertForSequenceClassification._from_config(
            transformers.BertConfig(num_labels=LABELS), attn_implementation="sdpa"
        )
    ours = bertfast.BertForSequenceClassification(theirs.config)
    ours.load_state_dict(theirs.state_dict())
    return {"bertfast": ours, "transformers": theirs}


def stepper(model, precision: str, lr: float):
    """step(batch) -> loss, one update of the weights."""
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=lr, fused=True)
    trained = list(model.parameters())

    def step(batch) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def check(found: dict, steps: dict, batch, precision) -> dict:
    """The losses of the first steps without dropout; stops where they differ."""
    losses = {}
    for name, model in found.items():
        model.eval()
        losses[name] = [steps[name](batch) for _ in range(CHECKED)]
        model.train()
    for ours, theirs in zip(*losses.values(), strict=True):
        if not abs(ours - theirs) <= TOLERANCE[precision] * theirs:
            raise SystemExit(f"{precision}: losses differ: {losses}")
    return losses


def measure(workload: str, precision: str, tokenizer, rounds: int) -> dict:
    name, title, lengths = WORKLOADS[workload]
    cell = {
        "workload": workload,
        "precision": precision,
        "task": f"{name} training step, {title}, {precision}",
    }
    if note := emulated(precision):
        print(f"{cell['task']}: {note}", flush=True)
        return cell | {"note": note}
    found = models(name)
    config = found["bertfast"].config
    batch = real_batch(tokenizer, lengths)
    batch["labels"] = torch.arange(len(lengths)) % LABELS
    steps = {side: stepper(model, precision, 1e-5) for side, model in found.items()}
    losses = check(found, steps, batch, precision)
    timed = interleave({side: lambda s=s: s(batch) for side, s in steps.items()}, rounds, 0)
    seconds = {side: median(s) for side, s in timed.items()}
    flop = 3 * encoder_flop(config, lengths)
    cell |= {
        "tokens": sum(lengths),
        "padded_tokens": batch["input_ids"].numel(),
        "losses": losses,
        "milliseconds": {side: round(1e3 * s, 2) for side, s in seconds.items()},
        # Three digits: a small model on a slow, busy machine has less than 0.05.
        "useful_gflops": {side: float(f"{flop / s / 1e9:.3g}") for side, s in seconds.items()},
        "ratio": round(seconds["transformers"] / seconds["bertfast"], 3),
    }
    print(
        f"{cell['task']}: {cell['ratio']:.2f}x; "
        + ", ".join(
            f"{side} {cell['milliseconds'][side]:.1f} ms, {rate} useful GFLOP/s"
            for side, rate in cell["useful_gflops"].items()
        ),
        flush=True,
    )
    return cell


def masked_batches(tokenizer, count: int) -> list[dict]:
    """Batches of 16 pieces of real text, each token masked with a probability of 15%; text that
    comes again has other masks."""
    pieces = [natural_lengths(16, seed) for seed in range(1, 1 + min(count, PIECES))]
    whole = real_batch(tokenizer, [n for piece in pieces for n in piece])
    specials = torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id])
    batches = []
    for i in range(count):
        at = i % len(pieces)
        rows, longest = slice(16 * at, 16 * at + 16), max(pieces[at])
        ids, mask = (whole[name][rows, :longest] for name in ("input_ids", "attention_mask"))
        draw = torch.rand(ids.shape, generator=torch.Generator().manual_seed(i))
        chosen = (draw < MASKED) & (mask == 1) & ~torch.isin(ids, specials)
        batches.append(
            {
                "input_ids": ids.masked_fill(chosen, tokenizer.mask_token_id),
                "attention_mask": mask,
                "labels": ids.masked_fill(~chosen, -100),
            }
        )
    return batches


def losses(batches, precision: str, dropout_seed: int) -> list[float]:
    torch.manual_seed(0)  # of the head, which is new
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = bertfast.BertForMaskedLM.from_pretrained(minilm()).train()
    torch.manual_seed(dropout_seed)
    step = stepper(model, precision, 1e-4)
    return [step(batch) for batch in batches]


def smooth(values: list[float]) -> torch.Tensor:
    return torch.tensor(values).unfold(0, min(SMOOTHED, len(values)), 1).mean(1)


def curve(tokenizer, count: int) -> dict:
    batches = masked_batches(tokenizer, count)
    runs = {
        "fp32": losses(batches, "fp32", 1),
        "bf16": losses(batches, "bf16", 1),
        "fp32, other dropout": losses(batches, "fp32", 2),
    }
    base = smooth(runs["fp32"])
    gaps = {n: (smooth(r) - base).abs().max().item() for n, r in runs.items() if n != "fp32"}
    print(
        f"{count} steps: smoothed loss from {base[0]:.3f} to {base[-1]:.3f}; largest gap to fp32: "
        + ", ".join(f"{name} {gap:.4f}" for name, gap in gaps.items()),
        flush=True,
    )
    if not gaps["bf16"] <= gaps["fp32, other dropout"]:
        raise SystemExit("bf16's loss departs from fp32's by more than other dropout masks do")
    return {"steps": count, "smoothed_over": SMOOTHED, "gaps": gaps, "losses": runs}


def summary(cells, found) -> list[dict]:
    rows = [
        {
            "task": cell["task"],
            "unit": "ms",
            "bertfast": cell["milliseconds"]["bertfast"],
            "rival": cell["milliseconds"]["transformers"],
            "rival_name": "transformers SDPA"
            + (", autocast" if cell["precision"] == "bf16" else ""),
            "ratio": cell["ratio"],
        }
        for cell in cells
        if "ratio" in cell
    ]
    if found:
        row = {"task": f"MiniLM, {found['steps']} steps in bf16: largest gap of the loss to fp32's"}
        row |= {"unit": "", "bertfast": found["gaps"]["bf16"], "ratio": None}
        row |= {"rival": found["gaps"]["fp32, other dropout"]}
        rows.append(row | {"rival_name": "other dropout masks"})
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="*", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--curve", type=int, default=200, metavar="N", help="steps; 0: no curve")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="folder (benchmarks/results/<device>)")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.threads < 1 or args.curve < 0:
        parser.error("--rounds and --threads: expected 1 or more; --curve: 0 or more")
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm())
    cells = []
    for workload in args.workloads:
        for precision in args.precisions:
            cells.append(measure(workload, precision, tokenizer, args.rounds))
            gc.collect()
    found = curve(tokenizer, args.curve) if args.curve else None
    result = {"rounds": args.rounds, "cells": cells, "curve": found}
    save("training_step", result | {"summary": summary(cells, found)}, args.out)


if __name__ == "__main__":
    main()
