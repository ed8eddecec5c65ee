"""Fine-tuning for question answering: bertfast beside transformers' Trainer with the stock model.

    python benchmarks/finetune_qa.py [--data FOLDER] [--seeds 0 1 2] [--rows 1500]

MiniLM learns which Debian package a question describes (qa.*.json.gz, SQuAD 2's form: a sixth of
the questions has no answer). Both sides have the same windows, settings and seeds, and take turns
seed by seed; the trained models are then run by transformers, decoded and scored by the same code,
with a threshold tuned on the validation part. Steps are timed as in finetune_sections.py.

First, from one head, without dropout and with the same batches, the losses of --loss-steps steps
are compared; the rival's loss is there without padding's share in its softmax, as ours always is.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from finetune_sections import step_times, training_seconds
from harness import ROOT, minilm, save
from torch.nn import functional as F

from bertfast import BertForQuestionAnswering
from bertfast.bench.measure import median
from bertfast.data import batches, collate
from bertfast.data.questions import Questions, load_questions
from bertfast.data.spans import QuestionWindows, question_windows
from bertfast.train import answers, finetune
from bertfast.train.tasks.qa import QAConfig

TOLERANCE = 1e-5  # of the largest logit, the model trained here loaded by transformers
LOSSES = 1e-4  # relative, of each of the steps without dropout


@dataclasses.dataclass
class Settings:
    """What both sides train with; dropout is the checkpoint's."""

    epochs: int = 2
    batch_size: int = 16
    lr: float = 1e-4
    max_length: int = 256
    stride: int = 64
    warmup: float = 0.1  # of all steps
    weight_decay: float = 0.01
    clip: float = 1.0
    max_answer_length: int = 30
    n_best: int = 20


@dataclasses.dataclass
class Part:
    """A file's questions and their windows."""

    path: Path
    questions: Questions
    windows: QuestionWindows

    def rows(self, order=None) -> list[dict]:
        """As transformers' model takes them."""
        pairs = list(zip(self.windows.rows, self.windows.targets, strict=True))
        return [
            {k: v.tolist() for k, v in row.items()}
            | {"start_positions": int(target[0]), "end_positions": int(target[1])}
            for row, target in (pairs if order is None else [pairs[i] for i in order])
        ]


def config(model, parts, s: Settings, seed: int, out: Path, **changes) -> QAConfig:
    given = dataclasses.asdict(s) | {"model": str(model), "out": str(out), "seed": seed}
    given |= {"train": str(parts["train"].path), "valid": str(parts["val"].path)}
    return QAConfig(**given | {"resume": "no", "device": "cpu", "metric": "f1"} | changes)


def scored(part: Part, logits, s: Settings, threshold=None) -> dict:
    """Exact match and F1; without a threshold at the one that is best."""
    limits = {"n_best": s.n_best, "max_answer_length": s.max_answer_length}
    found = answers.decode(logits, part.windows, **limits)
    gold = [[a.text for a in own] for own in part.questions.answers]
    answerable = np.array([bool(own) for own in gold])

    def raw(spans):
        return answers.raw_scores(answers.texts(part.questions, spans), gold, True)

    if threshold is None:
        f1 = raw([p.spans[0] if p.spans else None for p in found])[1]
        threshold = answers.best_threshold([p.diff for p in found], f1, answerable)[0]
    scores = raw([p.answer(threshold) for p in found])
    return answers.summary(*scores, answerable, True) | {"threshold": threshold}


def collator(pad: int):
    def collated(rows):
        out = collate(rows, pad)
        names = [n for n in ("start_positions", "end_positions") if n in rows[0]]
        if "token_type_ids" not in rows[0]:
            del out["token_type_ids"]
        return out | {name: torch.tensor([r[name] for r in rows]) for name in names}

    return collated


class Rival(transformers.Trainer):
    """transformers' Trainer; `losses` of the steps where they are asked for, of batches in the
    order of the data and without padding's share."""

    losses = None

    def _get_train_sampler(self, *args):
        if self.losses is None:
            return super()._get_train_sampler(*args)
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.losses is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        places = [inputs.pop(name) for name in ("start_positions", "end_positions")]
        out = model(**inputs)
        hidden = inputs["attention_mask"] == 0
        logits = [x.masked_fill(hidden, -torch.inf) for x in (out.start_logits, out.end_logits)]
        loss = sum(F.cross_entropy(x, p) for x, p in zip(logits, places, strict=True)) / 2
        self.losses.append(loss.item())
        return loss


def rival(network, tokenizer, parts, s: Settings, seed, out: Path, order=None, **changes) -> Rival:
    def f1(found):
        lengths = [len(row["input_ids"]) for row in parts["val"].windows.rows]
        both = np.stack(found.predictions, -1)
        own = [x[:n] for x, n in zip(both, lengths, strict=True)]
        return {"f1": scored(parts["val"], own, s)["f1"]}

    rows = parts["train"].rows(order)
    steps = s.epochs * -(-len(rows) // s.batch_size)
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
        "seed": seed,
        "use_cpu": True,
        "eval_strategy": "epoch",  # both keep the epoch that does best on the validation questions
        "save_strategy": "epoch",
        "save_only_model": True,
        "load_best_model_at_end": True,
        "metric_for_best_model": "f1",
        "label_names": ["start_positions", "end_positions"],
        "report_to": "none",
        "disable_tqdm": True,
    }
    return Rival(
        network,
        transformers.TrainingArguments(**given | changes),
        train_dataset=rows,
        eval_dataset=parts["val"].rows(),
        compute_metrics=f1,
        data_collator=collator(tokenizer.pad_token_id),
    )


def stock(folder, **options):
    return transformers.AutoModelForQuestionAnswering.from_pretrained(
        folder, attn_implementation="sdpa", **options
    )


@torch.inference_mode()
def logits(network, windows: QuestionWindows, pad: int, batch_size=32) -> list[np.ndarray]:
    """[tokens, 2] of each window, by any model of BERT's arguments."""
    network.eval()
    found = [None] * len(windows)
    lengths = [len(row["input_ids"]) for row in windows.rows]
    for chosen in batches(lengths, batch_size):
        out = network(**collator(pad)([windows.rows[i] for i in chosen]))
        both = torch.stack([out.start_logits, out.end_logits], -1).double().numpy()
        for i, values in zip(chosen, both, strict=True):
            found[i] = values[: lengths[i]]
    return found


def same_losses(model, tokenizer, parts, s: Settings, steps: int, work: Path) -> dict:
    """The losses of both sides from the same head, without dropout, on the same batches."""
    headed = work / "headed"
    torch.manual_seed(0)
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    network = stock(model, **rates)
    network.save_pretrained(headed)
    tokenizer.save_pretrained(headed)
    plain = {"warmup": 0.0, "schedule": "constant", "max_steps": steps, "epochs": 99}
    given = config(headed, parts, s, 0, work / "losses", **plain, eval_steps=10**9)
    finetune(given)
    lines = (work / "losses" / "metrics.jsonl").read_text().splitlines()
    ours = [r["loss"] for r in map(json.loads, lines) if "loss" in r]
    lengths = [len(row["input_ids"]) for row in parts["train"].windows.rows]
    order = [b for epoch in range(99) for b in batches(lengths, s.batch_size, 0, epoch)][:steps]
    if {len(b) for b in order} != {s.batch_size}:
        raise SystemExit(f"--loss-steps {steps} are more than an epoch's full batches; give fewer")
    order = [i for batch in order for i in batch]
    changes = {"lr_scheduler_type": "constant", "warmup_steps": 0, "max_steps": steps}
    changes |= {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    trainer = rival(network, tokenizer, parts, s, 0, work, order, **changes)
    trainer.losses = []
    trainer.train()
    theirs = trainer.losses
    error = max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))
    print(f"losses of {steps} steps: largest relative difference {error:.1e}", flush=True)
    if not error < LOSSES:
        raise SystemExit(f"losses differ from transformers' by {error:.1e}: {ours} and {theirs}")
    return {"steps": steps, "bertfast": ours, "transformers": theirs, "largest_difference": error}


def one_seed(seed, model, tokenizer, parts, s, work) -> dict:
    """Both sides trained, tested and, for ours, compared with transformers on the same weights."""
    pad = tokenizer.pad_token_id

    def ours(out):
        finetune(config(model, parts, s, seed, out))

    def theirs(out):
        transformers.set_seed(seed)
        trainer = rival(stock(model), tokenizer, parts, s, seed, out)
        trainer.train()
        trainer.model.save_pretrained(out)

    sides, row = {"bertfast": ours, "transformers": theirs}, {"seed": seed}
    for name in sorted(sides, reverse=bool(seed % 2)):  # neither always goes first
        out = work / f"{name}-{seed}"
        with step_times() as times:
            sides[name](out)
        network = stock(out)
        found = {p: logits(network, parts[p].windows, pad) for p in ("val", "test")}
        threshold = scored(parts["val"], found["val"], s)["threshold"]
        row[name] = {
            "training_seconds": round(training_seconds(times, s.epochs), 3),
            "steps": len(times),
            **scored(parts["test"], found["test"], s, threshold),
        }
        if name == "bertfast":
            mine = logits(BertForQuestionAnswering.from_pretrained(out), parts["test"].windows, pad)
            largest = max(np.abs(x).max() for x in found["test"])
            pairs = zip(mine, found["test"], strict=True)
            error = max(np.abs(a - b).max() for a, b in pairs) / largest
            if not error < TOLERANCE:
                raise SystemExit(f"logits differ from transformers' by {error:.1e} on {out}")
            row[name]["logit_error"] = float(error)
        print(f"seed {seed} {name}: {row[name]}", flush=True)
    return row


def read(path: Path, rows: int | None, out: Path, tokenizer, s: Settings) -> Part:
    """The first questions of a file, also as JSONL in `out`."""
    given = load_questions(path)
    given = given.select(range(min(rows or len(given), len(given))))
    columns = zip(given.ids, given.questions, given.contexts, given.answers, strict=True)
    lines = [
        {"id": i, "question": q, "contexts": c, "answers": [a._asdict() for a in own]}
        for i, q, c, own in columns
    ]
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    lengths = {"max_length": s.max_length, "stride": s.stride}
    return Part(out, given, question_windows(tokenizer, given, **lengths))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = ROOT.parent / "shared" / "data" / "debian"
    parser.add_argument("--data", type=Path, default=default, help="folder of qa.*.json.gz")
    parser.add_argument("--model", default=minilm(), help="a BERT checkpoint's folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=1500, help="first training questions")
    parser.add_argument("--test-rows", type=int, help="first validation and test questions (all)")
    parser.add_argument("--loss-steps", type=int, default=20, help="steps to compare; 0: none")
    parser.add_argument("--loss-batch-size", type=int, default=4, help="in each of them")
    parser.add_argument("--loss-lr", type=float, default=5e-5, help="larger ones part sooner")
    for name in ("epochs", "batch-size", "max-length", "stride"):
        value = getattr(Settings, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, help="folder (benchmarks/results/<device>)")
    args = parser.parse_args()
    if not args.data.is_dir():
        parser.error(f"--data {args.data} is no folder; expected qa.*.json.gz in it")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    names = ("epochs", "batch_size", "max_length", "stride")
    s = Settings(**{name: getattr(args, name) for name in names})
    limits = {"train": args.rows, "val": args.test_rows, "test": args.test_rows}
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        parts = {
            p: read(args.data / f"qa.{p}.json.gz", n, work / f"{p}.jsonl", tokenizer, s)
            for p, n in limits.items()
        }
        losses = None
        if args.loss_steps:
            few = dataclasses.replace(s, batch_size=args.loss_batch_size, lr=args.loss_lr)
            losses = same_losses(args.model, tokenizer, parts, few, args.loss_steps, work)
        rows = [one_seed(seed, args.model, tokenizer, parts, s, work) for seed in args.seeds]

    def over_seeds(key, reduce):
        return {n: reduce([r[n][key] for r in rows]) for n in ("bertfast", "transformers")}

    def mean(values):
        return sum(values) / len(values)

    seconds = over_seeds("training_seconds", median)
    f1, exact = over_seeds("f1", mean), over_seeds("exact_match", mean)
    ratio = seconds["transformers"] / seconds["bertfast"]
    print(f"training: {ratio:.2f}x transformers; mean F1 {f1}, exact match {exact}")
    count = len(parts["train"].questions)
    of = f"MiniLM, {count:,} Debian questions, windows of {s.max_length}"
    of += f", {s.epochs} epoch{'s' * (s.epochs > 1)}, fp32"
    figures = ((f"question answering, {of}", "s", seconds, round(ratio, 2)),)
    figures += ((f"test F1 after it, mean of {len(rows)} seeds", "", f1, None),)
    summary = [
        {
            "task": task,
            "unit": unit,
            **{"bertfast": values["bertfast"], "rival": values["transformers"]},
            "rival_name": "transformers Trainer",
            "ratio": ratio,
        }
        for task, unit, values, ratio in figures
    ]
    settings = dataclasses.asdict(s) | {"train_rows": count, "seeds": args.seeds}
    means = {"f1": f1, "exact_match": exact, "training_seconds_median": seconds}
    result = {"settings": settings, "runs": rows, "losses": losses, **means}
    save("finetune_qa", {**result, "ratio": round(ratio, 3), "summary": summary}, args.out)


if __name__ == "__main__":
    main()
