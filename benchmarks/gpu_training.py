"""Training steps of BERT on a GPU in bf16, over fp32 weights under autocast, dropout 0.1.

    python benchmarks/gpu_training.py --what finetune --config base --out FOLDER [--seconds 150]
        [--family ModernBERT-base]
        finetune    an accelerated BertForSequenceClassification under the Trainer's step (forward,
                    the loss's finite check, backward, clipping, fused AdamW, schedule, zero_grad)
                    beside stock with SDPA (DeBERTa's is eager); then bertfast's own loop, of BERT
        compiled    the same step under torch.compile, beside the accelerated model's
        pretrain    bertfast's loop on packed sequences of 512 tokens, masked words
        checks      a short model: 250 equal repeats of a step; 200 steps' losses as launched

Gradients are held against fp32's in the same run, dropout 0, and those of a replay against those of
a launch: the same bits where the batch fills its bucket; of the loop the losses. "launched" is
BERTFAST_GRAPHS=0. Natural lengths are several batches in turn. What does not fit into --seconds is
a row that says so.
"""

import argparse
import copy
import gc
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from gpu_loop import finetune_loop, pretrain_loop
from gpu_models import (
    SHAPES,
    Budget,
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
from bertfast.bench import train
from bertfast.bench.measure import take_turns
from bertfast.train.optimizer import parameter_groups

FAST, LAUNCHED = "bertfast accelerate", "bertfast accelerate, launched"
SIGHTS = 4  # of a batch, until its step is replayed
LOOP_SHAPES = ("32 x 512", "32 natural to 512", "128 x 128", "2 x 24")
REPEATS, STEPS = 250, 200
SHORT = dict(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024,
             vocab_size=1000)  # fmt: skip


class Side:
    """A model that is trained, in a way: `name` says which."""

    def __init__(self, name, reference, still=False):
        self.name, self.launch = name, name == LAUNCHED
        self.model = copy.deepcopy(reference).train()
        for module in self.model.modules() if still else ():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        self.report = None
        if name.startswith("bertfast"):
            self.report = bertfast.accelerate(self.model, strict=True)
        elif "compiled" in name:
            self.model.compile(dynamic=False)  # in place: its parameters keep their names

    def way(self):
        return launched() if self.launch else nullcontext()

    def loss(self, batch):
        with torch.autocast(batch["input_ids"].device.type, torch.bfloat16):
            return self.model(**batch).loss

    def gradients(self, batch):
        """The loss and every parameter's gradient."""
        self.model.zero_grad()
        with self.way():
            loss = self.loss(batch)
            loss.backward()
        grads = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad()
        return loss.item(), grads

    def stepper(self, lr=1e-5):
        """step(batch) -> loss, as transformers' Trainer makes one."""
        optimizer = torch.optim.AdamW(parameter_groups(self.model, 0.01), lr=lr, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 1e-3 * step))

        def step(batch):
            with self.way():
                loss = self.loss(batch)
                torch.isfinite(loss).item()  # `logging_nan_inf_filter`
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                self.model.zero_grad()
            return loss.detach()

        return step


def gap(found, expected) -> float:
    """The largest difference of any gradient to its like, relative to the largest value of all: 0
    where all bits are the same."""
    largest = max(e.abs().max().item() for e in expected.values())
    gaps = [(found[n].float() - e.float()).abs().max().item() for n, e in expected.items()]
    return max(gaps) / largest if found.keys() == expected.keys() else float("inf")


def parity(side, reference, batches) -> dict:
    """Gradients without dropout against fp32's, and how far a replay's are from a launch's.
    Raises: RuntimeError where they are wrong."""
    found = {"cosine": 1.0, "max_error": 0.0}
    for batch in batches:
        expected = train.gradients(reference, batch, "fp32")
        sights = [side.gradients(batch) for _ in range(SIGHTS)]
        for name, value in train.agreement(sights[-1], expected).items():
            if name in found:
                found[name] = (min if name == "cosine" else max)(found[name], value)
        if side.report is not None:
            with launched():
                plain = side.gradients(batch)
            largest = max(found.get("gap_to_launch", 0.0), gap(sights[-1][1], plain[1]))
            found["gap_to_launch"] = largest
    if not found["cosine"] >= train.COSINE["bf16"]:
        raise RuntimeError(f"gradients' cosine {found['cosine']}")
    return found


def reference_of(config, device):
    """transformers' classifier in fp32."""
    import transformers

    torch.manual_seed(0)
    with torch.device(device):  # where weights are drawn in no time
        return transformers.AutoModelForSequenceClassification.from_config(config)


def labelled(config, shape, device):
    batches = batches_of(config, shape, device)
    for batch in batches:
        batch["labels"] = train.labels_of("classify", batch, config.vocab_size)
    return batches


def cell(reference, names, batches, rounds, peak):
    """Rows of one shape: each side's gradients checked, then its step timed."""
    device, found, runs, sides = reference.device.type, {}, {}, {}
    for name in names:
        try:
            found[name] = parity(Side(name, reference, still=True), reference, batches)
            sides[name] = Side(name, reference)
            step = sides[name].stepper()
            runs[name] = lambda step=step: [step(batch) for batch in batches]
            for _ in range(SIGHTS):
                runs[name]()
        except Exception as e:
            runs.pop(name, None)
            yield {"name": name, "note": reason(e)}
    before = {name: replays(sides[name].report) for name in runs}
    seconds = take_turns(runs, rounds, device, warm=True)
    flop = sum(train.useful_flop(reference.config, batch) for batch in batches)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    for name in runs:
        row = figures(
            name, seconds[name] / len(batches), tokens / len(batches), flop / len(batches)
        )
        row["share_of_peak"] = round(row["useful_gflops"] / 1e3 / peak, 3)
        report = sides[name].report
        if report is not None and name != LAUNCHED and recorded(device):
            row["replays"] = replays(report) - before[name]
            if not row["replays"]:
                row["name"] += ", NOT REPLAYED"
        yield row | found[name]


def figures(name, seconds, tokens, flop) -> dict:
    return {
        "name": name,
        "milliseconds": round(1e3 * seconds, 4),
        "tokens_per_second": round(tokens / seconds),
        "useful_gflops": round(flop / seconds / 1e9, 1),
    }


def finetune(config, shapes, device, rounds, budget, results, what):
    reference = reference_of(config, device)
    stock = stock_of(config)
    names = ("transformers compiled", FAST) if what == "compiled" else (FAST, LAUNCHED, stock)
    for shape_name, shape in shapes.items():
        task = f"{results.title} fine-tuning, {shape_name}, bf16" + ", compiled" * (
            what != "finetune"
        )
        if not budget.allows():
            results.add(task, {"name": stock, "note": "left out: no time"})
            continue
        with budget.step():
            gc.collect()  # models of the shape before, their graphs with them
            torch.cuda.empty_cache()
            torch.compiler.reset()
            for row in cell(
                reference, names, labelled(config, shape, device), rounds, results.peak
            ):
                results.add(task, row)
        if what == "finetune" and config.model_type == "bert" and shape_name in LOOP_SHAPES:
            loops(task, finetune_loop, (config, shape, device), budget, results)


def loops(task, loop, arguments, budget, results):
    """Our loop's rows: replayed, and launched with the same losses."""
    losses = {}
    for name, way in (("bertfast loop", nullcontext), ("bertfast loop, launched", launched)):
        if not budget.allows():
            results.add(task, {"name": name, "note": "left out: no time"})
            continue
        try:
            with budget.step(), way():
                seconds, tokens, flop, extra, losses[name] = loop(*arguments)
        except Exception as e:
            results.add(task, {"name": name, "note": reason(e)})
            continue
        row = figures(name, seconds, tokens, flop) | extra
        row["share_of_peak"] = round(row["useful_gflops"] / 1e3 / results.peak, 3)
        results.add(task, row)
        if "sequences_per_second" in row:
            results.note(f"sequences a second, {task}, {name}", row["sequences_per_second"])
    if len(losses) == 2:
        results.note(f"losses of {task}, replayed and launched", compared(*losses.values()))


def compared(found, expected) -> dict:
    pairs = list(zip(found, expected, strict=False))
    gap = max((abs(a - b) for a, b in pairs), default=float("nan"))
    return {"steps": len(pairs), "equal": gap == 0, "largest_difference": gap}


def pretrain(config, shapes, device, rounds, budget, results, what):
    for sequences in (32, 64) if device == "cuda" else (4,):
        length = 512 if device == "cuda" else 24
        task = f"{results.title} pre-training, {sequences} x {length} packed, bf16"
        loops(task, pretrain_loop, (config, sequences, length, device), budget, results)


def checks(config, shapes, device, rounds, budget, results, what):
    """No speeds: whether a short model's steps are the same bits each time, and its losses those
    of launches."""
    import transformers

    short = config if config.hidden_size < 256 else transformers.BertConfig(**SHORT)
    reference = reference_of(short, device)
    count = (REPEATS, STEPS) if device == "cuda" else (6, 8)
    batches = labelled(short, (8, 64 if device == "cuda" else 24, True), device)
    side, first, worst = Side(FAST, reference), None, 0.0
    for i in range(SIGHTS + count[0]):
        torch.manual_seed(5)
        _, found = side.gradients(batches[0])
        if i == 0:
            launch = {name: g.clone() for name, g in found.items()}
        elif i >= SIGHTS:
            first = first or {name: g.clone() for name, g in found.items()}
            worst = max(worst, gap(found, first))
    compare = {"repeats": count[0], "equal": worst == 0, "gap_to_launch": gap(first, launch)}
    results.note("repeats of a step with one seed", compare)
    curves = []
    for name in (FAST, LAUNCHED):
        torch.manual_seed(7)
        step = Side(name, reference).stepper(1e-4)
        losses = [step(batches[i % len(batches)]) for i in range(count[1])]
        curves.append([loss.item() for loss in losses])
    results.note("losses replayed and launched", compared(*curves))
    results.note("replays of a repeated step", replays(side.report))


KINDS = {"finetune": finetune, "compiled": finetune, "pretrain": pretrain, "checks": checks}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", choices=KINDS, default="finetune")
    add_model(parser)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=150, help="no step begins past these")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    args = parser.parse_args()
    which = args.config, args.family
    if args.family != "BERT" and args.what == "pretrain":
        parser.error(f"--family {args.family}: bertfast's loop pre-trains BERT alone")
    budget, config = Budget(args.seconds), config_of(*which)
    results = Results(f"gpu_{args.what}_{file_of(*which)}", args.out, args.device)
    results.title = title_of(*which)
    shapes = shapes_of(args.config, args.shapes)
    KINDS[args.what](config, shapes, args.device, args.rounds, budget, results, args.what)
    return int(results.failed())


if __name__ == "__main__":
    sys.exit(main())
