"""BERT's inference on a GPU in bf16, accelerated, native and frozen, beside transformers with
SDPA, torch.compile and what anyone can write on torch alone: packed sequences, `varlen_attn`.
Another family's, accelerated, beside transformers (DeBERTa's is eager: it has nothing else).

    python benchmarks/gpu_inference.py --config base --out FOLDER [--seconds 150] [--compiled]
        [--family ModernBERT-base]

Every output is held against transformers' in fp32 in the same run. accelerate(padding="zeros"), as
heads that don't look at padding get it, and native models replay by themselves; "launched" is
BERTFAST_GRAPHS=0. Natural lengths are several batches in turn. --compiled times torch.compile alone
beside the accelerated model, in cells of their own: it takes minutes, a shape at a time. What does
not fit into --seconds is a row that says so.
"""

import argparse
import sys
from pathlib import Path

import torch
from gpu_models import (
    SHAPES,
    Budget,
    Packed,
    Results,
    add_model,
    batches_of,
    config_of,
    file_of,
    launched,
    reason,
    recorded,
    replays,
    shapes_of,
    stock_of,
    title_of,
)

import bertfast
from bertfast.bench.measure import encoder_flop, take_turns

FAST = "bertfast accelerate"
PADDED = "bertfast accelerate, padded rows too"
SIGHTS = 3  # of a bucket, until it is replayed


class Model:
    """A model to call: (batch) -> states. `replayed`: whether it has to be, on a GPU."""

    def __init__(self, model, report=None, launch=False):
        self.model, self.report, self.launch = model, report, launch

    def __call__(self, batch):
        if self.launch:
            with launched():
                return self.states(batch)
        return self.states(batch)

    def states(self, batch):
        with torch.inference_mode():
            found = self.model(**batch)
        return found if isinstance(found, torch.Tensor) else found.last_hidden_state


def weights_of(config, device):
    """transformers' model in fp32, and fresh(): the same in bf16; fresh(bertfast's class)."""
    import transformers

    bare = {"add_pooling_layer": False} if config.model_type == "bert" else {}
    torch.manual_seed(0)

    def made(dtype, cls=None):
        with torch.device(device):  # where weights are drawn in no time
            if cls is None:  # which keeps rotary frequencies in fp32
                return transformers.AutoModel.from_config(config, dtype=dtype, **bare).eval()
            return cls(config, **bare).eval().to(dtype)

    exact = made(torch.float32)

    def fresh(cls=None):
        model = made(torch.bfloat16, cls)
        model.load_state_dict(exact.state_dict())
        return model

    return exact, fresh


def accelerated(model, launch=False, padding="zeros"):
    return Model(model, bertfast.accelerate(model, strict=True, padding=padding), launch)


def models_of(config, fresh, device):
    """{name: Model}"""
    stock = fresh()
    calls = {FAST: accelerated(fresh()), stock_of(config): Model(stock)}
    calls["bertfast accelerate, launched"] = accelerated(fresh(), launch=True)
    calls[PADDED] = accelerated(fresh(), padding="stock")
    if config.model_type != "bert":
        return calls
    native = fresh(bertfast.BertModel)
    calls["bertfast"] = Model(native)
    frozen = fresh(bertfast.BertModel)
    bertfast.freeze(frozen, "bf16")
    calls["bertfast frozen"] = Model(frozen)
    if device == "cuda":
        calls["torch packed"] = Model(Packed(stock))
    return calls


def compiled_of(fresh, batch):
    """What fits a batch: small ones are graphs' case, which this mode has."""
    mode = "reduce-overhead" if batch["input_ids"].numel() <= 4096 else "default"
    torch.compiler.reset()
    name = f"transformers compiled, {mode}"
    return {name: Model(torch.compile(fresh(), mode=mode, dynamic=False))}


def relative_error(call, batches, truths):
    """The largest of any batch, at real tokens; each batch seen as often as makes it a replay."""
    largest = 0.0
    for _ in range(SIGHTS):
        for batch, truth in zip(batches, truths, strict=True):
            found = call(batch)[batch["attention_mask"].bool()].float()
            largest = max(largest, ((found - truth).norm() / truth.norm()).item())
            if largest != largest:
                return largest
    return largest


def cell(exact, calls, batches, rounds, device):
    """Rows of one shape."""
    real = [batch["attention_mask"].bool() for batch in batches]
    with torch.no_grad():
        truths = [exact(**b).last_hidden_state[m] for b, m in zip(batches, real, strict=True)]
    errors, notes = {}, {}
    for who, call in calls.items():
        try:
            errors[who] = relative_error(call, batches, truths)
        except Exception as e:
            notes[who] = reason(e)
    limit = 2 * errors.get(stock_of(exact.config), 1e-2) + 1e-3
    for who in [who for who, error in errors.items() if not error <= limit]:
        notes[who] = f"wrong: relative error {errors.pop(who):.1e} above {limit:.1e}"
    runs = {who: (lambda call=calls[who]: [call(batch) for batch in batches]) for who in errors}
    before = {who: replays(call.report) for who, call in calls.items()}
    seconds = take_turns(runs, rounds, device, warm=True)
    flop = sum(encoder_flop(exact.config, m.sum(1).tolist()) for m in real)
    tokens = sum(int(m.sum()) for m in real)
    for who, call in calls.items():
        if who in notes:
            yield {"name": who, "note": notes[who]}
            continue
        row = {"name": who, "milliseconds": round(1e3 * seconds[who] / len(batches), 4)}
        row["tokens_per_second"] = round(tokens / seconds[who])
        row["useful_gflops"] = round(flop / seconds[who] / 1e9, 1)
        if call.report is not None and not call.launch and recorded(device):
            row["replays"] = replays(call.report) - before[who]
        yield row | {"relative_error": errors[who]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model(parser)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=150, help="no step begins past these")
    parser.add_argument("--compiled", action="store_true", help="torch.compile, and nothing else")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    args = parser.parse_args()
    which = args.config, args.family
    budget, config = Budget(args.seconds), config_of(*which)
    name = f"gpu_inference_{file_of(*which)}" + "_compiled" * args.compiled
    results = Results(name, args.out, args.device)
    exact, fresh = weights_of(config, args.device)
    calls = {FAST: accelerated(fresh())} if args.compiled else models_of(config, fresh, args.device)
    for shape_name, shape in shapes_of(args.config, args.shapes).items():
        task = f"{title_of(*which)} inference, {shape_name}, bf16" + ", compiled" * args.compiled
        if not budget.allows():
            results.add(task, {"name": stock_of(config), "note": "left out: no time"})
            continue
        with budget.step():
            batches = batches_of(config, shape, args.device)
            more = compiled_of(fresh, batches[0]) if args.compiled else {}
            more |= {n: call for n, call in calls.items() if shape[2] or n != PADDED}
            for row in cell(exact, more, batches, args.rounds, args.device):
                if row.get("replays") == 0:
                    row["name"] += ", NOT REPLAYED"
                results.add(task, row)
    return int(results.failed())


if __name__ == "__main__":
    sys.exit(main())
