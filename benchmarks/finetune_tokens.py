"""Tagging on real text: bertfast beside transformers' Trainer, same settings, same CPU.

    python benchmarks/finetune_tokens.py [--data FOLDER] [--seeds 0 1 2] [--rows 3000]

MiniLM learns the entities in packages' descriptions (ner.*.conll.gz). The two take turns seed by
seed; a step's time is taken as in finetune_sections.py. First, on equal batches and without
dropout, the two sides' losses must be the same step for step.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from finetune_sections import step_times, training_seconds
from harness import ROOT, minilm, save

from bertfast.bench.measure import median
from bertfast.data.tagged import Tagged, load_tagged
from bertfast.train import finetune
from bertfast.train.entities import entity_scores
from bertfast.train.loop import train
from bertfast.train.packed import IGNORED
from bertfast.train.tasks.tokens import TokensConfig, TokensTask

TOLERANCE = 1e-4  # of the losses, relative, over all steps of equal batches


@dataclasses.dataclass
class Settings:
    """What both sides train with; dropout is the checkpoint's."""

    epochs: int = 3
    batch_size: int = 32
    lr: float = 2e-4
    max_length: int = 128
    warmup: float = 0.1  # of all steps
    weight_decay: float = 0.01
    clip: float = 1.0


def config_of(model, files, s: Settings, seed: int, out: Path, **options) -> TokensConfig:
    return TokensConfig(
        model=model,
        train=str(files["train"]),
        valid=str(files["val"]),
        out=str(out),
        **dataclasses.asdict(s),
        schedule="linear",
        precision="fp32",
        metric="micro_f1",
        resume="no",
        head="fresh",
        device="cpu",
        seed=seed,
        **options,
    )


def train_bertfast(model, files, s, seed, out):
    with step_times() as times:
        finetune(config_of(model, files, s, seed, out))
    return times


def encoded(tokenizer, part: Tagged, names, max_length: int) -> list[dict]:
    """As transformers' example for tagging has it: first sub-words are labelled."""
    ids = tokenizer(part.words, is_split_into_words=True, truncation=True, max_length=max_length)
    rows = []
    for i, tags in enumerate(part.tags):
        own = ids.word_ids(i)
        first = [
            w is not None and w != before for w, before in zip(own, [None, *own], strict=False)
        ]
        labels = [names.index(tags[w]) if f else IGNORED for w, f in zip(own, first, strict=True)]
        rows.append({"input_ids": ids["input_ids"][i], "labels": labels})
    return rows


def network_of(model, names):
    return transformers.AutoModelForTokenClassification.from_pretrained(
        model,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        attn_implementation="sdpa",
    )


def train_transformers(model, parts, names, s, seed, out):
    transformers.set_seed(seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    data = {n: encoded(tokenizer, part, names, s.max_length) for n, part in parts.items()}

    def micro_f1(found):
        return {"micro_f1": _micro(found.predictions.argmax(-1), found.label_ids, names)}

    network = network_of(model, names)
    steps = s.epochs * -(-len(data["train"]) // s.batch_size)
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
        metric_for_best_model="micro_f1",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        network,
        arguments,
        train_dataset=data["train"],
        eval_dataset=data["val"],
        compute_metrics=micro_f1,
        data_collator=transformers.DataCollatorForTokenClassification(tokenizer),
    )
    with step_times() as times:
        trainer.train()
    network.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return times


def _micro(predicted, labels, names) -> float:
    truth, found = [], []
    for p, row in zip(predicted, labels, strict=True):
        real = row != IGNORED
        truth.append([names[i] for i in row[real]])
        found.append([names[i] for i in p[real]])
    return entity_scores(truth, found)["micro"]["f1"]


@torch.inference_mode()
def test_f1(folder, part: Tagged, max_length: int) -> float:
    """Of a folder of either side, by transformers' own model, one text at a time."""
    network = transformers.AutoModelForTokenClassification.from_pretrained(folder).eval()
    names = [network.config.id2label[i] for i in range(network.config.num_labels)]
    rows = encoded(transformers.AutoTokenizer.from_pretrained(folder), part, names, max_length)
    predicted = [
        network(input_ids=torch.tensor([row["input_ids"]])).logits[0].argmax(-1).numpy()
        for row in rows
    ]
    return _micro(predicted, [np.array(row["labels"]) for row in rows], names)


def one_seed(seed, model, parts, files, names, s, work) -> dict:
    """Both sides trained and tested."""
    fit = {name: parts[name] for name in ("train", "val")}
    sides = {
        "bertfast": lambda out: train_bertfast(model, files, s, seed, out),
        "transformers": lambda out: train_transformers(model, fit, names, s, seed, out),
    }
    row = {"seed": seed}
    for name in sorted(sides, reverse=bool(seed % 2)):  # neither always goes first
        out = work / f"{name}-{seed}"
        times = sides[name](out)
        row[name] = {
            "training_seconds": round(training_seconds(times, s.epochs), 3),
            "steps": len(times),
            "micro_f1": test_f1(out, parts["test"], s.max_length),
        }
        print(f"seed {seed} {name}: {row[name]}", flush=True)
    return row


def equal_losses(model, files, s, steps: int, work: Path) -> dict:
    """Both sides' losses from the same weights, on the same batches, without dropout."""
    config = config_of(model, files, s, 0, work / "equal", max_steps=steps)
    task = TokensTask(config, torch.device("cpu"), lambda line: None)
    task.read()
    task.tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    torch.manual_seed(0)
    task.model = task.build(Path(model))
    task.check(Path(model))
    task.rows = {name: task.encode(part) for name, part in task.parts.items()}
    for module in task.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    task.model.config.hidden_dropout_prob = task.model.config.attention_probs_dropout_prob = 0.0
    task.model.save_pretrained(work / "start")
    network = transformers.AutoModelForTokenClassification.from_pretrained(work / "start").train()
    chosen = [b for epoch in range(config.epochs) for b in task.batches(epoch)][:steps]
    train(task.model, task, config, work / "equal", {}, lambda line: None)
    ours = [r["loss"] for r in _records(work / "equal" / "metrics.jsonl") if "loss" in r]
    theirs = _stock_losses(network, task, chosen, config)
    gap = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    if not gap < TOLERANCE:
        raise SystemExit(f"losses on equal batches differ by {gap:.1e}: {ours} and {theirs}")
    return {"steps": len(ours), "largest_relative_gap": gap, "first": ours[0], "last": ours[-1]}


def _records(path):
    import json

    return [json.loads(line) for line in path.read_text().splitlines()]


def _stock_losses(network, task, chosen, config) -> list[float]:
    """Of transformers' model under torch's AdamW, with the Trainer's decay and clipping."""
    from bertfast.train.optimizer import learning_rate

    # as the Trainer does: none on biases and norms
    decays = lambda name: not name.endswith("bias") and "LayerNorm" not in name
    parameters = list(network.named_parameters())
    groups = [
        {"params": [p for n, p in parameters if decays(n) == own], "weight_decay": decay}
        for own, decay in ((True, config.weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr)
    collate = transformers.DataCollatorForTokenClassification(task.tokenizer)
    losses = []
    for step, batch in enumerate(chosen):
        items = []
        for row in (task.rows["train"][i] for i in batch):
            labels = np.full(len(row["input_ids"]), IGNORED)
            labels[row["places"]] = row["tags"]
            items.append({"input_ids": list(row["input_ids"]), "labels": labels.tolist()})
        loss = network(**collate(items)).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(chosen), config)
        optimizer.step()
    return losses


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = ROOT.parent / "shared" / "data" / "debian"
    parser.add_argument("--data", type=Path, default=default, help="folder of ner.*.conll.gz")
    parser.add_argument("--model", default=minilm(), help="a BERT checkpoint's folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=3000, help="first training rows")
    parser.add_argument("--test-rows", type=int, help="first validation and test rows (all)")
    parser.add_argument("--epochs", type=int, default=Settings.epochs)
    parser.add_argument("--batch-size", type=int, default=Settings.batch_size)
    parser.add_argument("--equal-steps", type=int, default=20, help="steps on equal batches")
    parser.add_argument("--equal-batch-size", type=int, default=8, help="in each of them")
    parser.add_argument("--equal-lr", type=float, default=5e-5, help="larger ones part sooner")
    parser.add_argument("--out", type=Path, help="folder (benchmarks/results/<device>)")
    args = parser.parse_args()
    if not args.data.is_dir():
        parser.error(f"--data {args.data} is no folder; expected ner.*.conll.gz in it")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    s = Settings(epochs=args.epochs, batch_size=args.batch_size)
    limits = {"train": args.rows, "val": args.test_rows, "test": args.test_rows}
    parts = {}
    for name, n in limits.items():
        whole = load_tagged(args.data / f"ner.{name}.conll.gz")
        parts[name] = whole.select(range(min(n or len(whole), len(whole))))
    kinds = {kind for row in parts["train"].kinds() for kind in row}
    known = [i for i, row in enumerate(parts["val"].kinds()) if row <= kinds]
    parts["val"] = parts["val"].select(known)
    names = sorted({"O"} | {f"{letter}-{kind}" for letter in "BI" for kind in kinds})
    with tempfile.TemporaryDirectory() as work:
        work, files = Path(work), {}
        for name in ("train", "val"):
            files[name] = work / f"{name}.conll"
            _write(files[name], parts[name])
        few = {"batch_size": args.equal_batch_size, "lr": args.equal_lr, "epochs": 99}
        few = dataclasses.replace(s, **few)
        equal = equal_losses(args.model, files, few, args.equal_steps, work)
        if equal["steps"] != args.equal_steps:
            raise SystemExit(f"{equal['steps']} steps, expected {args.equal_steps}")
        print(f"equal batches: {equal}", flush=True)
        rows = [one_seed(seed, args.model, parts, files, names, s, work) for seed in args.seeds]

    def over_seeds(key, reduce):
        return {n: reduce([r[n][key] for r in rows]) for n in ("bertfast", "transformers")}

    def mean(values):
        return sum(values) / len(values)

    seconds, f1 = over_seeds("training_seconds", median), over_seeds("micro_f1", mean)
    ratio = seconds["transformers"] / seconds["bertfast"]
    print(f"training: {ratio:.2f}x transformers; mean micro F1 of entities {f1}")
    of = f"MiniLM, {len(parts['train']):,} rows of Debian entities, {s.epochs} epochs, fp32"
    summary = [
        {
            "task": f"training, {of}",
            "unit": "s",
            **{"bertfast": seconds["bertfast"], "rival": seconds["transformers"]},
            "rival_name": "transformers Trainer",
            "ratio": round(ratio, 2),
        },
        {
            "task": f"test micro F1 of entities after it, mean of {len(rows)} seeds",
            "unit": "",
            **{"bertfast": f1["bertfast"], "rival": f1["transformers"]},
            "rival_name": "transformers Trainer",
            "ratio": None,
        },
    ]
    settings = dataclasses.asdict(s) | {"train_rows": len(parts["train"]), "seeds": args.seeds}
    figures = {"micro_f1": f1, "training_seconds_median": seconds, "equal_batches": equal}
    result = {"settings": settings, "runs": rows, **figures, "ratio": round(ratio, 3)}
    save("finetune_tokens", {**result, "summary": summary}, args.out)


def _write(path: Path, part: Tagged) -> None:
    rows = zip(part.words, part.tags, strict=True)
    blocks = ("\n".join(f"{w}\t{t}" for w, t in zip(*row, strict=True)) for row in rows)
    path.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
