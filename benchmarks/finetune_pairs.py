"""Ranking fine-tuned: `finetune pairs` beside sentence-transformers' CrossEncoderTrainer, same CPU.

    python benchmarks/finetune_pairs.py [--data FOLDER] [--seeds 0 1 2] [--queries 200]

MiniLM learns which description (the document) belongs to a package's synopsis (the query), both of
sections.*.jsonl.gz, among descriptions of the same section. The two take turns seed by seed, steps
timed as in finetune_sections.py; both folders are then loaded and ranked by a stock CrossEncoder,
whose scores `predict` must give for ours.

First, from one head, without dropout and with the same batches, the losses of --loss-steps steps
are compared.
"""

import argparse
import dataclasses
import json
import random
import tempfile
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from finetune_sections import Settings, read, step_times, training_seconds
from harness import ROOT, minilm, save
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

from bertfast.bench.measure import median
from bertfast.data import Candidates, batches, encode, load_candidates
from bertfast.train import finetune, ranking
from bertfast.train.tasks.pairs import PairsConfig, predict

TOLERANCE = 1e-5  # of a score, ours beside sentence-transformers' on the same weights
LOSSES = 1e-4  # relative, of each step without dropout
METRIC = "mrr@10"


def lists(rows: list[dict], queries: int, wrong: int, seed: int = 0) -> list[dict]:
    """{"query", "positive", "negative"}: a synopsis, its description and others of its section."""
    found, of = [], {}
    for row in rows:
        query, _, document = row["text"].partition(". ")
        if document.strip():
            found.append((query, document, row["label"]))
            of.setdefault(row["label"], []).append(document)
    draw, made = random.Random(seed), []
    for query, document, label in found:
        others = sorted({*of[label]} - {document})
        if len(others) >= wrong and len(made) < queries:
            negative = draw.sample(others, wrong)
            made.append({"query": query, "positive": [document], "negative": negative})
    return made


def config(model, files, s: Settings, seed: int, out: Path, **changes) -> PairsConfig:
    given = dataclasses.asdict(s) | {"model": str(model), "out": str(out), "seed": seed}
    given |= {"train": str(files["train"]), "valid": str(files["val"]), "goal": "ranking"}
    given |= {"schedule": "linear", "precision": "fp32", "metric": METRIC, "head": "fresh"}
    return PairsConfig(**given | {"resume": "no", "device": "cpu"} | changes)


class InOrder(CrossEncoderTrainer):
    """Takes the rows in their order, and keeps the losses of its steps."""

    losses: list

    def get_batch_sampler(self, dataset, batch_size, *args, **kwargs):
        order = torch.utils.data.SequentialSampler(dataset)
        return torch.utils.data.BatchSampler(order, batch_size, False)

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


def rival(model: CrossEncoder, part: Candidates, s: Settings, out, cls=None, order=None, **changes):
    """A trainer over a part's pairs, in an order given or at random."""
    order = range(len(part)) if order is None else order
    columns = {"query": part.texts, "document": part.pairs, "label": part.labels}
    data = datasets.Dataset.from_dict({n: [own[i] for i in order] for n, own in columns.items()})
    steps = s.epochs * -(-len(part) // s.batch_size)
    given = {
        "output_dir": str(out / "trainer"),
        "num_train_epochs": s.epochs,
        "per_device_train_batch_size": s.batch_size,
        "learning_rate": s.lr,
        "lr_scheduler_type": "linear",
        "warmup_steps": round(s.warmup * steps),
        "weight_decay": s.weight_decay,
        "max_grad_norm": s.clip,
        "optim": "adamw_torch_fused",
        "use_cpu": True,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    settings = CrossEncoderTrainingArguments(**given | changes)
    loss = BinaryCrossEntropyLoss(model)
    return (cls or CrossEncoderTrainer)(model, settings, train_dataset=data, loss=loss)


def stock(folder, s: Settings, **options) -> CrossEncoder:
    more = {"max_length": s.max_length, "device": "cpu", "config_kwargs": options}
    return CrossEncoder(str(folder), num_labels=1, **more)


def same_losses(model, files, part, s: Settings, steps: int, work: Path) -> dict:
    """The losses of both sides' steps; stops where they differ."""
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    network = stock(model, s, **rates)
    network.save_pretrained(str(work / "headed"))
    plain = {"warmup": 0.0, "schedule": "constant", "max_steps": steps, "epochs": 99}
    plain |= {"head": "keep", "eval_steps": 10**9}
    finetune(config(work / "headed", files, s, 0, work / "losses", **plain))
    lines = map(json.loads, (work / "losses" / "metrics.jsonl").read_text().splitlines())
    ours = [r["loss"] for r in lines if "loss" in r]
    rows = encode(network.tokenizer, part.texts, part.pairs, s.max_length)
    lengths = [len(row["input_ids"]) for row in rows]
    order = [b for epoch in range(99) for b in batches(lengths, s.batch_size, 0, epoch)][:steps]
    if {len(b) for b in order} != {s.batch_size}:
        raise SystemExit(f"{len(part)} pairs are no multiple of --loss-batch-size {s.batch_size}")
    order = [i for batch in order for i in batch]
    changes = {"lr_scheduler_type": "constant", "warmup_steps": 0, "max_steps": steps}
    trainer = rival(network, part, s, work, InOrder, order, **changes)
    trainer.losses = []
    trainer.train()
    theirs = trainer.losses
    error = max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))
    print(f"losses of {steps} steps: largest relative difference {error:.1e}", flush=True)
    if not error < LOSSES:
        raise SystemExit(f"losses differ by {error:.1e}: {ours} and {theirs}")
    return {"steps": steps, "largest_difference": error, "bertfast": ours, "rival": theirs}


def one_seed(seed, model, files, parts, s, work) -> dict:
    """Both sides trained and tested."""

    def theirs(out):
        transformers.set_seed(seed)
        network = stock(model, s)
        rival(network, parts["train"], s, work / "rival", seed=seed).train()
        network.save_pretrained(str(out))

    sides = {
        "bertfast": lambda out: finetune(config(model, files, s, seed, out)),
        "sentence-transformers": theirs,
    }
    row, test = {"seed": seed}, parts["test"]
    pairs = list(zip(test.texts, test.pairs, strict=True))
    for name in sorted(sides, reverse=bool(seed % 2)):  # neither always goes first
        out = work / f"{name}-{seed}"
        with step_times() as times:
            sides[name](out)
        scores = stock(out, s).predict(pairs, show_progress_bar=False)
        own = ranking.of_queries(scores, np.asarray(test.labels), test.groups())
        row[name] = {"training_seconds": round(training_seconds(times, s.epochs), 3)}
        row[name] |= {"steps": len(times)} | own
        if name == "bertfast":
            error = float(np.abs(np.array(predict(str(out), pairs, device="cpu")) - scores).max())
            if not error < TOLERANCE:
                raise SystemExit(f"scores differ from a CrossEncoder's by {error:.1e} on {out}")
            row[name]["score_error"] = error
        print(f"seed {seed} {name}: {row[name]}", flush=True)
    return row


def main(given=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = ROOT.parent / "shared" / "data" / "debian"
    parser.add_argument("--data", type=Path, default=default, help="folder of sections.*.jsonl.gz")
    parser.add_argument("--model", default=minilm(), help="a BERT checkpoint's folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--queries", type=int, default=200, help="for training")
    parser.add_argument("--test-queries", type=int, default=50, help="and as many for validation")
    parser.add_argument("--wrong", type=int, default=3, help="documents beside the right one")
    parser.add_argument("--loss-steps", type=int, default=20, help="steps to compare; 0: none")
    parser.add_argument("--loss-batch-size", type=int, default=8, help="in each of them")
    parser.add_argument("--loss-lr", type=float, default=2e-5, help="larger ones part sooner")
    for name, value in (("epochs", 1), ("batch-size", 16), ("lr", 2e-4), ("max-length", 128)):
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--out", type=Path, help="folder (benchmarks/results/<device>)")
    args = parser.parse_args(given)
    if not args.data.is_dir():
        parser.error(f"--data {args.data} is no folder; expected sections.*.jsonl.gz in it")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    names = ("epochs", "batch_size", "lr", "max_length")
    s = Settings(**{name: getattr(args, name) for name in names})
    queries = {"train": args.queries, "val": args.test_queries, "test": args.test_queries}
    with tempfile.TemporaryDirectory() as work:
        work, files, parts = Path(work), {}, {}
        for p, n in queries.items():
            rows = lists(read(args.data / f"sections.{p}.jsonl.gz", None), n, args.wrong)
            files[p] = work / f"{p}.jsonl"
            files[p].write_text("".join(json.dumps(row) + "\n" for row in rows))
            parts[p] = load_candidates(files[p])
        losses = None
        if args.loss_steps:
            few = dataclasses.replace(s, batch_size=args.loss_batch_size, lr=args.loss_lr)
            settings = few, args.loss_steps, work
            losses = same_losses(args.model, files, parts["train"], *settings)
        rows = [one_seed(seed, args.model, files, parts, s, work) for seed in args.seeds]
    result = {"settings": dataclasses.asdict(s) | {"queries": queries, "seeds": args.seeds}}
    save("finetune_pairs", result | {"losses": losses} | figures(rows, parts, s), args.out)


def figures(rows, parts, s):
    sides = ("bertfast", "sentence-transformers")
    seconds = [median([r[n]["training_seconds"] for r in rows]) for n in sides]
    found = [float(np.mean([r[n][METRIC] for r in rows])) for n in sides]
    ratio = seconds[1] / seconds[0]
    print(f"training: {ratio:.2f}x; mean {METRIC} {found}")
    of = f"{len(parts['train']):,} pairs of Debian synopses and descriptions"
    of += f", {s.epochs} epoch{'s' * (s.epochs > 1)}, fp32"
    told = ((f"training, MiniLM, {of}", "s", seconds, round(ratio, 2)),)
    told += ((f"test MRR@10 of rankings after it, mean of {len(rows)} seeds", "", found, None),)
    summary = [
        {
            "task": task,
            "unit": unit,
            **{"bertfast": values[0], "rival": values[1]},
            "rival_name": "sentence-transformers CrossEncoderTrainer",
            "ratio": ratio,
        }
        for task, unit, values, ratio in told
    ]
    return {"runs": rows, METRIC: dict(zip(sides, found, strict=True)), "summary": summary}


if __name__ == "__main__":
    main()
