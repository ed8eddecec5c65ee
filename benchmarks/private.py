"""A private training step (DP-SGD) on the CPU beside Opacus', and what privacy costs.

    python benchmarks/private.py [--data FOLDER] [--sequences 16] [--threads N] [--rounds 5]

MiniLM's shape with random weights on the texts of sections.train.jsonl.gz, ragged, cut to
--longest tokens, no dropout. Four sides, each in a process of its own, take turns: bertfast
privately, bertfast without privacy, and Opacus on transformers' BERT (SDPA, padded), with
gradients of each example and with ghost norms. A step is forward, loss, clipped gradients, noise
and fused AdamW. First each private side gives its clipped sum, which must be the same. Memory is
the peak of a process in its steps, beyond what it had before it made the model (/proc).
"""

import argparse
import contextlib
import gzip
import importlib
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from harness import ROOT, median, minilm, save

from bertfast.bench.memory import forget_peak, resident

CLIP, SIGMA = 0.1, 1.0
# Of all gradients together, relative: both are in fp32, Opacus' sums over padded texts too.
TOLERANCE = 1e-4
LABELS = 4


def losses(logits, targets):
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def weights() -> tuple:
    """The configuration of both sides' models, and equal weights."""
    config = transformers.BertConfig.from_pretrained(minilm(), num_labels=LABELS)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification._from_config(config)
    return config, model.state_dict()


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


class Ours:
    private, imports = True, ("bertfast", "bertfast.train.private.step")

    def __init__(self, rows):
        import bertfast
        from bertfast.train.packed import Packed
        from bertfast.train.private.accounts import Budget
        from bertfast.train.private.step import PrivateStep
        from bertfast.train.ranks import Ranks
        from bertfast.train.step import Step

        config, state = weights()
        self.model = bertfast.BertForSequenceClassification(config).train()
        self.model.load_state_dict(state)
        self.batch, self.count = Packed.of_rows(rows), len(rows)
        rest = adamw(self.model), 1, 0.0, contextlib.nullcontext, Ranks(), print
        if self.private:
            budget = Budget(8.0, 1e-5, CLIP, 1000, self.count, 100, SIGMA)
            self.step = PrivateStep(budget, losses, SimpleNamespace(model=self.model), *rest)
        else:
            self.step = Step(self.loss, *rest)

    def loss(self, batch):
        packed = batch.input_ids, batch.cu_seqlens, batch.max_seqlen
        logits = self.model.packed_logits(*packed, batch.position_ids, batch.token_type_ids)
        return losses(logits, batch.targets).sum()

    def __call__(self):
        self.step.begin([float(self.count)], 1e-5)
        self.step.add(self.step.ready([self.batch] if self.private else self.batch))
        self.step.update()

    def gradients(self):
        from bertfast.train.private.gradients import clipped

        clipped(self.model, self.batch, losses, CLIP)
        return self.taken(self.model)

    @staticmethod
    def taken(model):
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        return found


class Open(Ours):
    private = False


class Opacus:
    """Gradients of each example."""

    imports = "opacus", "transformers.models.bert.modeling_bert"

    def __init__(self, rows):
        from bertfast.data import collate

        config, state = weights()
        self.model = transformers.BertForSequenceClassification._from_config(
            config, attn_implementation="sdpa"
        ).train()
        self.model.load_state_dict(state)
        self.given = collate(rows, 0)
        self.labels = self.given.pop("labels")
        # Its hooks take one row of positions for one example.
        ids = self.given["input_ids"]
        self.given["position_ids"] = torch.arange(ids.shape[1]).repeat(len(ids), 1)
        self.make()

    def make(self):
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer

        self.module = GradSampleModule(self.model, loss_reduction="mean")
        self.optimizer = DPOptimizer(adamw(self.model), **self.settings())

    def settings(self):
        count = len(self.labels)
        return {"noise_multiplier": SIGMA, "max_grad_norm": CLIP, "expected_batch_size": count}

    def backward(self):
        losses(self.module(**self.given).logits, self.labels).mean().backward()

    def __call__(self):
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradients(self):
        self.backward()
        self.optimizer.clip_and_accumulate()
        found = {n: p.summed_grad.clone() for n, p in self.model.named_parameters()}
        self.optimizer.zero_grad()
        return found


class Ghost(Opacus):
    """Ghost norms, and a second backward."""

    def make(self):
        from opacus.grad_sample import GradSampleModuleFastGradientClipping as Module
        from opacus.optimizers import DPOptimizerFastGradientClipping as Optimizer

        self.module = Module(self.model, loss_reduction="mean", max_grad_norm=CLIP)
        self.optimizer = Optimizer(adamw(self.model), **self.settings())

    def backward(self):
        from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

        found = losses(self.module(**self.given).logits, self.labels)
        DPTensorFastGradientClipping(self.module, self.optimizer, found).backward()

    def gradients(self):
        self.backward()
        return Ours.taken(self.model)


SIDES = {"bertfast": Ours, "bertfast, not private": Open}
SIDES |= {"opacus": Opacus, "opacus, ghost norms": Ghost}


def serve(pipe, name, rows, threads, folder):
    """A side: its clipped sum into a file, then a step at each call; at last its peak in MB."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    try:
        for module in SIDES[name].imports:
            importlib.import_module(module)
        before = resident("VmRSS")
        side = SIDES[name](rows)
        if name != "bertfast, not private":
            torch.save(side.gradients(), Path(folder) / f"{list(SIDES).index(name)}.pt")
        side()
        forget_peak()
        pipe.send(None)
        while pipe.recv():
            start = time.perf_counter()
            side()
            pipe.send(time.perf_counter() - start)
        pipe.send(resident("VmHWM") - before)
    except Exception as e:
        pipe.send(e)


def start(rows, threads, folder) -> tuple[dict, dict]:
    """(pipes of the sides that run, why the others don't)"""
    context, pipes, failed, started = multiprocessing.get_context("spawn"), {}, {}, {}
    for name in SIDES:
        started[name], there = context.Pipe()
        arguments = there, name, rows, threads, folder
        context.Process(target=serve, args=arguments, daemon=True).start()
    for name, pipe in started.items():  # nothing is timed before all are ready
        found = pipe.recv()
        if isinstance(found, Exception):
            failed[name] = f"{type(found).__name__}: {found}"
        else:
            pipes[name] = pipe
        print(f"{name}: {failed.get(name, 'runs')}", flush=True)
    return pipes, failed


def differences(folder, names) -> dict:
    """Of a private side's clipped sum to ours, relative to all of it; stops where it is large."""
    sums = {n: torch.load(Path(folder) / f"{list(SIDES).index(n)}.pt") for n in names}
    ours, found = sums.pop("bertfast"), {}
    size = torch.stack([g.double().norm() for g in ours.values()]).norm()
    for name, theirs in sums.items():
        apart = [(theirs[key].view_as(g) - g).double().norm() for key, g in ours.items()]
        found[name] = (torch.stack(apart).norm() / size).item()
        if not found[name] <= TOLERANCE:
            raise SystemExit(f"{name}: its clipped sum differs by {found[name]:.1e}")
    return found


def read(folder: Path, count: int, longest: int) -> list[dict]:
    from bertfast.data import encode

    with gzip.open(folder / "sections.train.jsonl.gz", "rt") as f:
        texts = [json.loads(next(f))["text"] for _ in range(count)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm())
    rows = encode(tokenizer, texts, max_length=longest)
    return [row | {"labels": i % LABELS} for i, row in enumerate(rows)]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = ROOT.parent / "shared" / "data" / "debian"
    parser.add_argument("--data", type=Path, default=default, help="folder (%(default)s)")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--longest", type=int, default=256, help="tokens a text is cut to")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="folder (benchmarks/results/<device>)")
    args = parser.parse_args(argv)
    if min(args.sequences, args.rounds, args.threads) < 1:
        parser.error("--sequences, --rounds, --threads: expected 1 or more")
    torch.set_num_threads(args.threads)
    rows = read(args.data, args.sequences, args.longest)
    lengths = [len(row["input_ids"]) for row in rows]
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        pipes, failed = start(rows, args.threads, folder)
        apart = differences(folder, [n for n in pipes if n != "bertfast, not private"])
        for _ in range(args.rounds):
            for name, pipe in pipes.items():
                pipe.send(True)
                seconds.setdefault(name, []).append(pipe.recv())
        for pipe in pipes.values():
            pipe.send(False)
        memory = {name: pipe.recv() for name, pipe in pipes.items()}
    middle = {name: median(s) for name, s in seconds.items()}
    rivals = [name for name in middle if name.startswith("opacus")]
    best = min(rivals, key=middle.get)
    result = {
        "lengths": lengths,
        "threads": args.threads,
        "rounds": args.rounds,
        "clipped_sums_apart": apart,
        "seconds": {name: round(s, 4) for name, s in middle.items()},
        "every_second": {name: [round(x, 4) for x in s] for name, s in seconds.items()},
        "peak_mb": {name: round(m) for name, m in memory.items()},
        "speedup": {name: round(middle[name] / middle["bertfast"], 2) for name in rivals},
        "cost_of_privacy": round(middle["bertfast"] / middle["bertfast, not private"], 3),
        "memory_of_privacy": round(memory["bertfast"] / memory["bertfast, not private"], 3),
        "failed": failed,
    }
    task = f"private training step, MiniLM's shape, {len(rows)} texts of {min(lengths)} to "
    task += f"{max(lengths)} tokens, fp32"
    row = {"task": task, "unit": "s", "bertfast": result["seconds"]["bertfast"]}
    row |= {"rival": result["seconds"][best], "rival_name": best, "ratio": result["speedup"][best]}
    for key in ("seconds", "peak_mb", "speedup", "cost_of_privacy", "memory_of_privacy"):
        print(key, result[key], flush=True)
    save("private", result | {"summary": [row]}, args.out)


if __name__ == "__main__":
    main()
