"""Quality of classification after fine-tuning: bertfast beside transformers' Trainer, many seeds.

    python benchmarks/finetune_quality.py [--data FOLDER] [--seeds 20] [--rows 1000]
        [--loss-steps 200] [--minutes N]

Short runs of MiniLM on Debian sections (see finetune_sections.py, whose sides these are), paired by
seed: the mean differences of test macro F1, accuracy and cross-entropy, and their 95% intervals by
Student's t. Each side draws its own head, order and dropout, as their users have it.

First, from one head, without dropout and with the same batches, the losses of --loss-steps steps
are compared. Every seed is written when it is done: a later call with the same settings goes on
from there, and --minutes ends one after so many.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path

import torch
import transformers
from finetune_sections import Settings, logits, read, scores, train_bertfast, train_transformers
from harness import ROOT, interval, load, minilm, save

from bertfast.data import batches, encode
from bertfast.dropin import accelerate
from bertfast.train import ClassifyConfig, finetune

LOSSES = 1e-4  # relative, of each step without dropout


class InOrder(transformers.Trainer):
    """Takes the rows in their order, and keeps the losses of its steps."""

    losses: list

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


def same_losses(model, parts, s: Settings, steps: int, work: Path) -> dict:
    """The losses of both sides' steps; stops where they differ."""
    names = sorted({r["label"] for r in parts["train"]})
    headed, labels = work / "headed", dict(enumerate(names))
    torch.manual_seed(0)
    network = transformers.AutoModelForSequenceClassification.from_pretrained(
        model,
        num_labels=len(names),
        id2label=labels,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    network.save_pretrained(headed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.save_pretrained(headed)
    ours = ClassifyConfig(
        model=str(headed), train=str(work / "train.jsonl"), valid=str(work / "val.jsonl"),
        out=str(work / "losses"), batch_size=s.batch_size, lr=s.lr, max_length=s.max_length,
        weight_decay=s.weight_decay, clip=s.clip, schedule="constant", warmup=0.0, epochs=99,
        max_steps=steps, eval_steps=10**9, resume="no", device="cpu",
    )  # fmt: skip
    finetune(ours)
    lines = map(json.loads, (work / "losses" / "metrics.jsonl").read_text().splitlines())
    found = [r["loss"] for r in lines if "loss" in r]
    rows = encode(tokenizer, [r["text"] for r in parts["train"]], None, s.max_length)
    rows = [
        ids | {"labels": names.index(r["label"])}
        for ids, r in zip(rows, parts["train"], strict=True)
    ]
    lengths = [len(row["input_ids"]) for row in rows]
    order = [b for epoch in range(99) for b in batches(lengths, s.batch_size, 0, epoch)]
    order = [b for b in order if len(b) == s.batch_size][:steps]
    if any(len(b) < s.batch_size for b in batches(lengths, s.batch_size)):
        raise SystemExit(f"--rows {len(rows)} is no multiple of a batch, {s.batch_size}")
    arguments = transformers.TrainingArguments(
        output_dir=str(work / "rival"), max_steps=steps, per_device_train_batch_size=s.batch_size,
        learning_rate=s.lr, lr_scheduler_type="constant", weight_decay=s.weight_decay,
        max_grad_norm=s.clip, optim="adamw_torch_fused", use_cpu=True, eval_strategy="no",
        save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = InOrder(
        network,
        arguments,
        train_dataset=[rows[i] for batch in order for i in batch],
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
    )
    trainer.losses = []
    trainer.train()
    theirs = trainer.losses
    error = max(abs(a / b - 1) for a, b in zip(found, theirs, strict=True))
    print(f"losses of {steps} steps: largest relative difference {error:.1e}", flush=True)
    if not error < LOSSES:
        raise SystemExit(f"losses differ from transformers' by {error:.1e}: {found} and {theirs}")
    return {"steps": steps, "largest_difference": error, "bertfast": found, "transformers": theirs}


def one_seed(seed, model, parts, s, work) -> dict:
    """Test figures of both sides, each model then run by the same code."""
    names = sorted({r["label"] for r in parts["train"]})
    texts, labels = ([r[key] for r in parts["test"]] for key in ("text", "label"))
    files = {p: work / f"{p}.jsonl" for p in ("train", "val")}
    tokenizer, row = transformers.AutoTokenizer.from_pretrained(model), {"seed": seed}
    sides = {
        "bertfast": lambda out: train_bertfast(model, files, s, seed, out),
        "transformers": lambda out: train_transformers(model, parts, names, s, seed, out),
    }
    for name, train in sides.items():
        out = work / f"{name}-{seed}"
        train(out)
        network = transformers.AutoModelForSequenceClassification.from_pretrained(out)
        accelerate(network)
        found = logits(network, tokenizer, texts, s.max_length)
        row[name] = scores(found, labels, network.config.id2label)
        row[name]["loss"] = cross_entropy(found, labels, network.config.id2label)
    print(json.dumps(row), flush=True)
    return row


def cross_entropy(logits, labels, id2label) -> float:
    """The mean over the texts whose label training had; seeds scatter less in it than in F1."""
    ids = {label: i for i, label in id2label.items()}
    known = [i for i, label in enumerate(labels) if label in ids]
    targets = torch.tensor([ids[labels[i]] for i in known])
    return torch.nn.functional.cross_entropy(logits[known].double(), targets).item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = ROOT.parent / "shared" / "data" / "debian"
    parser.add_argument("--data", type=Path, default=default, help="folder of sections.*.jsonl.gz")
    parser.add_argument("--model", default=minilm(), help="a BERT checkpoint's folder")
    parser.add_argument("--seeds", type=int, default=20, help="how many")
    parser.add_argument("--rows", type=int, default=1000, help="first training rows")
    parser.add_argument("--loss-steps", type=int, default=200, help="steps to compare; 0: none")
    parser.add_argument("--loss-batch-size", type=int, default=8, help="in each of them")
    parser.add_argument("--loss-lr", type=float, default=5e-5, help="larger ones part sooner")
    for name, value in (("epochs", 2), ("batch-size", 32), ("lr", 1e-4), ("max-length", 48)):
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--minutes", type=float, default=1e9, help="after which no seed begins")
    parser.add_argument("--out", type=Path, help="folder (benchmarks/results/<device>)")
    args = parser.parse_args()
    if not args.data.is_dir():
        parser.error(f"--data {args.data} is no folder; expected sections.*.jsonl.gz in it")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    names = ("epochs", "batch_size", "lr", "max_length")
    s = Settings(**{name: getattr(args, name) for name in names})
    limits = {"train": args.rows, "val": 300, "test": None}
    parts = {p: read(args.data / f"sections.{p}.jsonl.gz", n) for p, n in limits.items()}
    known = {r["label"] for r in parts["train"]}
    parts["val"] = [r for r in parts["val"] if r["label"] in known]
    parts["train"] = parts["train"][: len(parts["train"]) // s.batch_size * s.batch_size]
    settings = dataclasses.asdict(s) | {"train_rows": len(parts["train"])}
    before = load("finetune_quality", args.out) or {}
    if before.get("settings") != settings:
        before = {"runs": [], "losses": None}
    done, losses, end = before["runs"], before["losses"], time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        for part in ("train", "val"):
            text = "".join(json.dumps(r) + "\n" for r in parts[part])
            (work / f"{part}.jsonl").write_text(text)
        if args.loss_steps and not losses:
            few = dataclasses.replace(s, batch_size=args.loss_batch_size, lr=args.loss_lr)
            losses = same_losses(args.model, parts, few, args.loss_steps, work)
        for seed in range(args.seeds):
            if seed in {row["seed"] for row in done} or time.monotonic() > end:
                continue
            done.append(one_seed(seed, args.model, parts, s, work))
            if len(done) > 1:
                write(settings, done, losses, args.out)
    print(f"{len(done)} seeds of {args.seeds}")
    if len(done) > 1:  # one has no spread
        for key in ("macro_f1", "loss"):
            print(f"{key}: {interval(done, key)}")


def write(settings, done, losses, out):
    keys = "macro_f1", "accuracy", "loss"
    result = {"settings": settings} | {k: interval(done, k) for k in keys}
    f1 = result["macro_f1"]
    task = f"test macro F1 on Debian sections, {settings['train_rows']:,} rows, "
    task += f"mean of {len(done)} seeds"
    row = {"task": task, "unit": "", "ratio": None, "rival_name": "transformers Trainer"}
    row |= {"bertfast": f1["bertfast"], "rival": f1["transformers"]}
    save("finetune_quality", result | {"runs": done, "losses": losses, "summary": [row]}, out)


if __name__ == "__main__":
    main()
