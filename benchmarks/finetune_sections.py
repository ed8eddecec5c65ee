"""Fine-tuning on real text: bertfast beside transformers' Trainer, same settings, same CPU.

    python benchmarks/finetune_sections.py [--data FOLDER] [--seeds 0 1 2] [--rows 3000]

MiniLM learns the Debian section of a package from its description (sections.*.jsonl.gz). The two
take turns seed by seed. A step's time runs from the end of one optimizer step to the end of the
next, taken by the same hook on torch's optimizers, so it holds everything a step needs (batch,
forward, backward, clipping, update) and, since the steps at an epoch's start don't count, neither
evaluation nor checkpoints. Training seconds are the number of steps times their median.
"""

import argparse
import dataclasses
import gzip
import json
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from harness import ROOT, minilm, save
from sklearn.metrics import accuracy_score, f1_score
from torch.optim.optimizer import register_optimizer_step_post_hook

from bertfast import BertForSequenceClassification
from bertfast.bench.measure import median
from bertfast.data import encode
from bertfast.train import ClassifyConfig, finetune

TOLERANCE = 1e-5  # of the largest logit, the model trained here loaded by transformers


@dataclasses.dataclass
class Settings:
    """What both sides train with; dropout is the checkpoint's."""

    epochs: int = 3
    batch_size: int = 32
    lr: float = 1e-4
    max_length: int = 128
    warmup: float = 0.1  # of all steps
    weight_decay: float = 0.01
    clip: float = 1.0


@contextmanager
def step_times():
    """Collects the clock after every optimizer step, whoever's loop it is."""
    times = []
    hook = register_optimizer_step_post_hook(lambda *_: times.append(time.perf_counter()))
    try:
        yield times
    finally:
        hook.remove()


def training_seconds(times: list[float], epochs: int) -> float:
    """Steps times their median seconds, leaving out those that follow an epoch's end."""
    per_epoch, rest = divmod(len(times), epochs)
    if rest or per_epoch < 2:
        raise SystemExit(
            f"{len(times)} optimizer steps in {epochs} epochs, expected 2 or more each"
        )
    inside = [times[i] - times[i - 1] for i in range(1, len(times)) if i % per_epoch]
    return len(times) * median(inside)


def train_bertfast(model, files, s: Settings, seed: int, out: Path):
    config = ClassifyConfig(
        model=model,
        train=str(files["train"]),
        valid=str(files["val"]),
        out=str(out),
        epochs=s.epochs,
        batch_size=s.batch_size,
        lr=s.lr,
        max_length=s.max_length,
        warmup=s.warmup,
        weight_decay=s.weight_decay,
        clip=s.clip,
        schedule="linear",
        precision="fp32",
        metric="macro_f1",
        resume="no",
        seed=seed,
    )
    with step_times() as times:
        finetune(config)
    return times


def train_transformers(model, parts, names, s: Settings, seed: int, out: Path):
    transformers.set_seed(seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)

    def dataset(rows):
        rows_ids = encode(tokenizer, [r["text"] for r in rows], None, s.max_length)
        pairs = zip(rows_ids, rows, strict=True)
        return [ids | {"labels": names.index(r["label"])} for ids, r in pairs]

    def macro_f1(found):
        predicted = found.predictions.argmax(1)
        return {"macro_f1": f1_score(found.label_ids, predicted, average="macro", zero_division=0)}

    data = dataset(parts["train"])
    network = transformers.AutoModelForSequenceClassification.from_pretrained(
        model,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        attn_implementation="sdpa",
    )
    steps = s.epochs * -(-len(data) // s.batch_size)
    arguments = transformers.TrainingArguments(
        output_dir=str(out / "trainer"),
        num_train_epochs=s.epochs,
        per_device_train_batch_size=s.batch_size,
        learning_rate=s.lr,
        lr_scheduler_type="linear",
        warmup_steps=round(s.warmup * steps),
        weight_decay=s.weight_decay,
        max_grad_norm=s.clip,
        optim="adamw_torch_fused",
        seed=seed,
        use_cpu=True,
        eval_strategy="epoch",  # both keep the epoch that does best on the validation rows
        save_strategy="epoch",
        save_only_model=True,
        load_best_model_at_end=True,
        metric_for_best_model="macro_f1",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        network,
        arguments,
        train_dataset=data,
        eval_dataset=dataset(parts["val"]),
        compute_metrics=macro_f1,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
    )
    with step_times() as times:
        trainer.train()
    network.save_pretrained(out)
    return times


@torch.inference_mode()
def logits(network, tokenizer, texts, max_length, batch_size=64):
    """[texts, labels] in the order of `texts`."""
    network.eval()
    found = []
    for i in range(0, len(texts), batch_size):
        rows = encode(tokenizer, texts[i : i + batch_size], None, max_length)
        found.append(
            network(
                **tokenizer.pad({"input_ids": [r["input_ids"] for r in rows]}, return_tensors="pt")
            ).logits
        )
    return torch.cat(found)


def scores(logits, labels, id2label) -> dict:
    predicted = [id2label[i] for i in logits.argmax(1).tolist()]
    macro = f1_score(labels, predicted, average="macro", zero_division=0)
    return {"macro_f1": float(macro), "accuracy": float(accuracy_score(labels, predicted))}


def read(path: Path, rows: int | None) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for _, line in zip(range(rows or 10**9), lines)]  # noqa: B905


def one_seed(seed, model, parts, files, s, work):
    """Both sides trained, tested and, for ours, compared with transformers on the same weights."""
    names = sorted({r["label"] for r in parts["train"]})
    texts, labels = ([r[key] for r in parts["test"]] for key in ("text", "label"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    sides = {
        "bertfast": lambda out: train_bertfast(model, files, s, seed, out),
        "transformers": lambda out: train_transformers(model, parts, names, s, seed, out),
    }
    row = {"seed": seed}
    for name in sorted(sides, reverse=bool(seed % 2)):  # neither always goes first
        out = work / f"{name}-{seed}"
        times = sides[name](out)
        stock = transformers.AutoModelForSequenceClassification.from_pretrained(out)
        found = logits(stock, tokenizer, texts, s.max_length)
        row[name] = {
            "training_seconds": round(training_seconds(times, s.epochs), 3),
            "steps": len(times),
            **scores(found, labels, stock.config.id2label),
        }
        if name == "bertfast":
            ours = BertForSequenceClassification.from_pretrained(out)
            mine = logits(ours, tokenizer, texts, s.max_length)
            error = ((mine - found).abs().max() / found.abs().max()).item()
            if not error < TOLERANCE:
                raise SystemExit(f"logits differ from transformers' by {error:.1e} on {out}")
            exact = logits(stock.double(), tokenizer, texts[:128], s.max_length)
            row[name]["logit_error"] = {
                "to transformers, of the largest logit": error,
                "to fp64": (mine[:128] - exact).abs().max().item(),
                "transformers' to fp64": (found[:128] - exact).abs().max().item(),
            }
        print(f"seed {seed} {name}: {row[name]}", flush=True)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = ROOT.parent / "shared" / "data" / "debian"
    parser.add_argument("--data", type=Path, default=default, help="folder of sections.*.jsonl.gz")
    parser.add_argument("--model", default=minilm(), help="a BERT checkpoint's folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=3000, help="first training rows")
    parser.add_argument("--test-rows", type=int, help="first validation and test rows (all)")
    parser.add_argument("--epochs", type=int, default=Settings.epochs)
    parser.add_argument("--out", type=Path, help="folder (benchmarks/results/<device>)")
    args = parser.parse_args()
    if not args.data.is_dir():
        parser.error(f"--data {args.data} is no folder; expected sections.*.jsonl.gz in it")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    s = Settings(epochs=args.epochs)
    limits = {"train": args.rows, "val": args.test_rows, "test": args.test_rows}
    parts = {p: read(args.data / f"sections.{p}.jsonl.gz", n) for p, n in limits.items()}
    known = {r["label"] for r in parts["train"]}
    parts["val"] = [r for r in parts["val"] if r["label"] in known]
    with tempfile.TemporaryDirectory() as work:
        work, files = Path(work), {}
        for part in ("train", "val"):
            files[part] = work / f"{part}.jsonl"
            files[part].write_text("".join(json.dumps(r) + "\n" for r in parts[part]))
        rows = [one_seed(seed, args.model, parts, files, s, work) for seed in args.seeds]

    def over_seeds(key, reduce):
        return {n: reduce([r[n][key] for r in rows]) for n in ("bertfast", "transformers")}

    def mean(values):
        return sum(values) / len(values)

    seconds, f1 = over_seeds("training_seconds", median), over_seeds("macro_f1", mean)
    ratio = seconds["transformers"] / seconds["bertfast"]
    print(f"training: {ratio:.2f}x transformers; mean macro F1 {f1}")
    of = f"MiniLM, {len(parts['train']):,} rows of Debian sections, {s.epochs} epochs, fp32"
    summary = [
        {
            "task": f"training, {of}",
            "unit": "s",
            **{"bertfast": seconds["bertfast"], "rival": seconds["transformers"]},
            "rival_name": "transformers Trainer",
            "ratio": round(ratio, 2),
        },
        {
            "task": f"test macro F1 after it, mean of {len(rows)} seeds",
            "unit": "",
            **{"bertfast": f1["bertfast"], "rival": f1["transformers"]},
            "rival_name": "transformers Trainer",
            "ratio": None,
        },
    ]
    settings = dataclasses.asdict(s) | {"train_rows": len(parts["train"]), "seeds": args.seeds}
    accuracy = over_seeds("accuracy", mean)
    means = {"macro_f1": f1, "accuracy": accuracy, "training_seconds_median": seconds}
    result = {"settings": settings, "runs": rows, **means, "ratio": round(ratio, 3)}
    save("finetune_sections", {**result, "summary": summary}, args.out)


if __name__ == "__main__":
    main()
