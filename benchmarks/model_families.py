"""Families other than BERT, in base size, on a CPU: accelerated and frozen beside stock.

    python benchmarks/model_families.py [--families ModernBERT-base ...] [--rounds 3] [--tiny]

Inference of the encoder, with padding="zeros" as heads and poolings that don't look at padding get
it, and a step of training of its classifier (forward, backward, fused AdamW). The rival is the
untouched model with SDPA, or eager where transformers has no other. Weights are random; the text is
the standard library's docstrings. States at real tokens and all gradients are held against the
stock model's in fp32 first; bf16 and int8 by the cosine of mean-pooled sequences.
"""

import argparse
import copy
import gc
from pathlib import Path

import torch
import transformers
from base_sizes import FAMILIES, TINY, config_of
from harness import minilm, real_batch, save

import bertfast
from bertfast.bench import train
from bertfast.bench.command import table
from bertfast.bench.measure import natural_lengths, take_turns

NATURAL, LONG = natural_lengths(16), [4096]
TITLES = {"natural": "16 natural-length sequences", "long": "1 x 4096 tokens"}
CELLS = {  # family: its cells
    "ModernBERT-base": ("natural", "training", "long"),
    "DeBERTa-v3-base": ("natural", "training"),
}
FROZEN = dict.fromkeys(CELLS, ("fp32", "bf16", "int8"))
ERROR, GRADIENTS = 2e-5, 1e-4  # relative, fp32
COSINE = {"bf16": 0.999, "int8": 0.998}


def agreement(found, expected, mask) -> dict:
    """Of states at real tokens, and the mean cosine of what is pooled from them."""
    real = mask.bool()
    error = (found[real] - expected[real]).norm() / expected[real].norm()
    pooled = [(x * real[..., None]).sum(1) for x in (found.nan_to_num(), expected)]
    cosine = torch.cosine_similarity(*pooled).mean()
    return {"relative_error": float(f"{error:.2e}"), "cosine": round(cosine.item(), 6)}


def hold(name, precision, found) -> dict:
    """`found`, if it is what it should be."""
    right = found["relative_error"] <= ERROR
    if precision in COSINE:
        right = found["cosine"] >= COSINE[precision]
    if not right:
        raise SystemExit(f"{name}, {precision}: outputs are not the stock model's: {found}")
    return found


def accelerated(stock, precision=None):
    """A copy, all of it accelerated; or why it can't be frozen."""
    ours = copy.deepcopy(stock)
    bertfast.accelerate(ours, strict=True, padding="zeros")
    try:
        return bertfast.freeze(ours, precision) if precision else ours
    except (ValueError, RuntimeError) as e:
        return str(e)


@torch.inference_mode()
def inference(name, config, batch, precisions, rounds) -> list[dict]:
    torch.manual_seed(0)
    with torch.inference_mode(False):
        stock = transformers.AutoModel.from_config(config).eval()
        sides = {None: accelerated(stock)} | {p: accelerated(stock, p) for p in precisions}
    rival = f"transformers {config._attn_implementation}"
    mask, notes, found = batch["attention_mask"], [], {rival: {}}
    runs = {rival: lambda: stock(**batch).last_hidden_state}
    expected = runs[rival]()
    for precision, model in sides.items():
        who = f"bertfast frozen, {precision}" if precision else "bertfast accelerate"
        if isinstance(model, str):
            notes.append({"name": who, "note": model})
            continue
        runs[who] = lambda model=model: model(**batch).last_hidden_state
        found[who] = hold(name, precision, agreement(runs[who](), expected, mask))
    seconds = take_turns(runs, rounds, warm=True, one_openmp=True)
    return rows_of(seconds, found, int(mask.sum())) + notes


def training(name, config, batch, rounds) -> list[dict]:
    torch.manual_seed(0)
    stock = transformers.AutoModelForSequenceClassification.from_config(config)
    ours = copy.deepcopy(stock)
    bertfast.accelerate(ours, strict=True)
    batch = batch | {"labels": train.labels_of("classify", batch, config.vocab_size)}
    grads = [train.gradients(model, batch, "fp32") for model in (ours, stock)]
    found = train.agreement(*grads)
    if not found["max_error"] <= GRADIENTS:
        raise SystemExit(f"{name}: gradients are not the stock model's: {found}")
    del grads
    rival = f"transformers {config._attn_implementation}"
    runs = {
        "bertfast accelerate": train.step_of(ours, batch, "fp32"),
        rival: train.step_of(stock, batch, "fp32"),
    }
    seconds = take_turns(runs, rounds, one_openmp=True)
    tokens = int(batch["attention_mask"].sum())
    return rows_of(seconds, {"bertfast accelerate": found, rival: {}}, tokens)


def rows_of(seconds, found, tokens) -> list[dict]:
    return [
        {"name": who, "milliseconds": round(1e3 * s, 3), "tokens_per_second": round(tokens / s)}
        | found[who]
        for who, s in sorted(seconds.items(), key=lambda pair: pair[1])
    ]


def summary(cells) -> list[dict]:
    """A line for each of ours that was timed, beside stock in fp32."""
    lines = []
    for cell in cells:
        rows = [row for row in cell["rows"] if "note" not in row]
        (rival,) = (row for row in rows if row["name"].startswith("transformers"))
        for row in rows:
            if row is not rival:
                lines.append(
                    {
                        "task": f"{cell['task']} ({row['name']})",
                        "unit": "ms",
                        "bertfast": row["milliseconds"],
                        "rival": rival["milliseconds"],
                        "rival_name": rival["name"],
                        "ratio": round(rival["milliseconds"] / row["milliseconds"], 2),
                    }
                )
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="models that take no time")
    parser.add_argument("--out", type=Path, help="folder (benchmarks/results/<device>)")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: expected 1 or more")
    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm())
    batches = {"natural": real_batch(tokenizer, NATURAL), "long": real_batch(tokenizer, LONG)}
    cells = []
    for name in args.families:
        config = config_of(name, **TINY if args.tiny else {})
        for kind in CELLS.get(name, ("natural",)):
            batch = batches["long" if kind == "long" else "natural"]
            if kind == "training":
                task = f"{name} training step, {TITLES['natural']}, fp32"
                rows = training(name, config, batch, args.rounds)
            else:
                task = f"{name} inference, {TITLES[kind]}, fp32"
                precisions = FROZEN.get(name, ()) if kind == "natural" else ()
                rows = inference(name, config, batch, precisions, args.rounds)
            mask = batch["attention_mask"]
            sizes = {"tokens": int(mask.sum()), "padded_tokens": mask.numel()}
            cells.append({"task": task, **sizes, "rounds": args.rounds, "rows": rows})
            print("\n" + table(task, cells[-1]), flush=True)
            gc.collect()
    save("model_families", {"cells": cells, "summary": summary(cells)}, args.out)


if __name__ == "__main__":
    main()
