"""Fine-tuning for classification (single- and multi-label, pairs) and regression."""

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from .. import data
from ..files import locked, regular, sha256, write_text
from ..model import checkpoint
from ..model.tokenizer import load_tokenizer
from . import head, inputs, metrics, outputs, plots
from .config import ConfigError, FinetuneConfig
from .inference import (
    choose_device,
    compute_logits,
    mean_loss,
    scored,
)
from .inputs import encoded_rows
from .loop import train
from .outputs import say
from .packed import Packed
from .ranks import require_one_process
from .task import Task

# What may differ when a run is resumed.
_FREE = {"out", "resume", "keep", "save_steps", "allow_pickle", "device", "parallel"}
# What of the pretrained checkpoint counts, beside its weights.
_BASE = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt")


class ClassificationTask(Task):
    """Batches, losses and metrics of encoded examples."""

    def __init__(self, config, labels, tokenizer, train, valid, device):
        self.config, self.labels, self.device = config, labels, device
        self.pad = tokenizer.pad_token_id
        self.train, self.valid = train, valid
        self.class_weights = self.on_device = None
        if config.class_weights:
            given = {data.normal(name): w for name, w in config.class_weights.items()}
            own = [data.normal(name) for name in labels.names]
            unknown = sorted(set(given) - set(own))
            if unknown:
                raise ConfigError(
                    f"class_weights names {', '.join(unknown)}, which no row has; "
                    f"known are {', '.join(labels.names)}"
                )
            self.class_weights = torch.tensor([float(given.get(name, 1)) for name in own])
            if not self.class_weights.any():
                raise ConfigError("class_weights are 0 for all classes, expected one above 0")
            self.on_device = self.class_weights.to(device)

    def batches(self, epoch):
        lengths, config = [len(row["input_ids"]) for row in self.train], self.config
        return data.batches(lengths, config.batch_size, config.seed, epoch, config.batch_tokens)

    def load(self, batch):
        return Packed.of_rows([self.train[i] for i in batch])

    def tokens(self, batch):
        return len(batch.input_ids)

    def weight(self, batch):
        if self.class_weights is not None:
            return float(self.class_weights[batch.targets].sum())
        return float(batch.targets.numel())

    def loss(self, model, batch):
        hidden = model.bert.encode_packed(
            *(batch.input_ids, batch.cu_seqlens, batch.max_seqlen),
            *(batch.position_ids, batch.token_type_ids, batch.first),
        )
        logits = model.classifier(model.dropout(model.bert.pooler(hidden)))
        real = () if batch.real is None else (batch.real,)
        return self.summed_loss(logits.float(), batch.targets, *real)

    def summed_loss(self, logits, targets, real=None):
        """targets: `IGNORED` of what counts for nothing, or numbers. real: int64 [sequences]: 0
        where numbers do; None where all count."""
        if self.config.task == "single_label":
            return F.cross_entropy(logits, targets, weight=self.on_device, reduction="sum")
        reduction, targets = "sum" if real is None else "none", targets.float()
        if self.config.task == "regression":
            losses = F.mse_loss(logits[:, 0], targets, reduction=reduction)
        else:
            losses = F.binary_cross_entropy_with_logits(logits, targets, reduction=reduction)
        if real is None:
            return losses
        return torch.where(real.unsqueeze(1) > 0, losses.view(len(real), -1), 0).sum()

    def evaluate(self, model, score=None):
        logits = compute_logits(model, self.valid, self.pad)
        targets = np.array([row["labels"] for row in self.valid])
        loss = mean_loss(logits, targets, self.config.task)
        return metrics.summary(logits, targets, self.config.task, loss)


def _load(config, path, text_label=True):
    return data.load_classification(
        regular(path),  # it is read again, for its checksum
        text_column=config.text_column,
        text_pair_column=config.text_pair_column,
        label_column=config.label_column if text_label else None,
        task=config.task,
        dedup=config.dedup,
    )


def _read_data(config):
    """(train, valid, test or None); what isn't given is split off the training data."""
    parts = {
        name: _load(config, p)
        for name in ("train", "valid", "test")
        if (p := getattr(config, name))
    }
    for name, part in parts.items():
        if not len(part):
            raise data.DataError(f"{getattr(config, name)} has no rows")
    train_part, valid, test = (parts.get(name) for name in ("train", "valid", "test"))
    if valid is None:
        fractions = (0.8, 0.1, 0.1) if test is None else (0.9, 0.1, 0.0)
        train_part, valid, held_out = data.split(train_part, fractions, config.seed)
        test = held_out if test is None else test
        if not len(valid):
            raise data.DataError(
                f"{config.train} has too few rows to split off a validation part; give --valid"
            )
    return train_part, valid, test if test is not None and len(test) else None


def freeze(model, layers: int | None) -> None:
    """Freeze the embeddings and the first `layers` layers; None freezes nothing."""
    if layers is None:
        return
    total = len(model.bert.encoder.layer)
    if not 0 <= layers <= total:
        raise ConfigError(f"freeze_layers is {layers}, the model has {total} layers")
    for module in (model.bert.embeddings, *model.bert.encoder.layer[:layers]):
        module.requires_grad_(False)


def finetune(config: FinetuneConfig, dry_run: bool = False) -> dict:
    """Fine-tune a checkpoint on labelled text and evaluate it; the results also go to `out`.

    `out` receives the model and tokenizer (which transformers loads too), README.md,
    run_config.yaml, metrics.jsonl, eval_results.json, training_curve.png, data_report.json and,
    for single-label tasks, confusion_matrix.csv and .png. The model comes first: of the rest what
    can't be written is a warning. Progress goes to stderr.

    Returns {"valid": metrics, "test": metrics, "train": how training went}; None for a dry run,
    which checks everything and trains nothing.

    Raises: ConfigError, data.DataError, model.CheckpointError, TrainingError, InterruptedRunError;
    OSError where `out` can't be written or another run has it, or the disk is full.
    """
    import accelerate  # noqa: F401  where one lacks, no run should start
    import sklearn.metrics  # noqa: F401

    config.require("model", "train", "out")
    require_one_process("finetune")
    out = Path(config.out)
    outputs.check(out, config.model, (config.train, config.valid, config.test))
    folder = checkpoint.resolve(config.model)
    device = choose_device(config.device)
    checkpoint.verify(folder, config.allow_pickle)
    train_part, valid, test = _read_data(config)
    labels = data.LabelSet.from_examples(train_part)
    tokenizer = load_tokenizer(folder)
    model, labels = _model(config, folder, labels, train_part.width is not None)
    inputs.check(tokenizer, model, folder, config.max_length, train_part.pairs is not None)
    config = _defined(config, valid)
    report = data.dataset_report(train_part, valid, test, tokenizer, config.max_length)
    say(str(report))
    encoded = {
        name: encoded_rows(tokenizer, part, labels, config.max_length)
        for name, part in (("train", train_part), ("valid", valid), ("test", test))
        if part is not None
    }
    task = ClassificationTask(config, labels, tokenizer, encoded["train"], encoded["valid"], device)
    if dry_run:
        say(f"dry run: {len(task.batches(0))} batches an epoch on {device}; nothing trained")
        return None

    with locked(out):
        outputs.write_yaml(out / "run_config.yaml", config)
        outputs.write_json(out / "data_report.json", report.as_dict())
        outcome = train(model, task, config, out, _fingerprint(config, folder), say)
        outputs.save(model, tokenizer, out)
        return _results(config, model, tokenizer, labels, encoded, outcome, out)


def _defined(config, valid):
    """The settings with a metric that these validation data have."""
    if config.metric not in ("r2", "pearson") or len(set(valid.labels)) > 1:
        return config
    say(
        f"warning: there is no {config.metric} of validation labels that are all "
        f"{valid.labels[0]} (rows: {len(valid)}): the loss picks the best evaluation"
    )
    return dataclasses.replace(config, metric="loss")


def _model(config, folder, labels, flags):
    """The model, and the classes in the order of its outputs."""
    torch.manual_seed(config.seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, labels = head.load(folder, labels, config.fresh_head, flags, config.allow_pickle)
    for w in caught:
        say(str(w.message))
    freeze(model, config.freeze_layers)
    model.gradient_checkpointing_enable(config.gradient_checkpointing)
    return model, labels


def _fingerprint(config, folder) -> dict:
    """What must be the same when a run is resumed."""
    base = [p for name in _BASE if (p := folder / name).is_file()]
    base += checkpoint.files(folder, config.allow_pickle)
    given = {k: v for k, v in config.as_dict().items() if k not in _FREE}
    for name in ("batch_tokens", "fresh_head"):  # checkpoints of before there was one go on
        if given[name] is None:
            del given[name]
    given |= {
        f"{k}_sha256": sha256(getattr(config, k)) for k in ("train", "valid") if getattr(config, k)
    }
    return given | {"model_sha256": {p.name: sha256(p) for p in base}}


def _results(config, model, tokenizer, labels, encoded, outcome, out) -> dict:
    """Evaluates the trained model, and writes the figures of the run."""
    results = {"train": outcome}
    for name in ("valid", "test"):
        if name in encoded:
            logits = compute_logits(model, encoded[name], tokenizer.pad_token_id)
            results[name] = scored(logits, encoded[name], labels)
    with outputs.optional(out / "eval_results.json") as path:
        outputs.write_json(path, results)
    with outputs.optional(out / "README.md") as path:
        _write_card(path, config, labels, results, len(encoded["train"]))
    with outputs.optional(out / "training_curve.png") as path:
        plots.training_curve(out / "metrics.jsonl", config.metric, path)
    if config.task == "single_label":
        truth = [row["labels"] for row in encoded["test" if "test" in encoded else "valid"]]
        predicted = metrics.predicted(logits, config.task)
        with outputs.optional(out / "confusion_matrix.png"):
            plots.confusion_matrix(truth, predicted, labels.names, out)
    return results


_MADE = "fine-tuned with bertfast"  # how a card is known for ours


def _step_size(config) -> str:
    if config.batch_tokens is None:
        return f"{config.batch_size * config.accumulation}"
    return f"up to {config.batch_tokens * config.accumulation:,} tokens"


def _write_card(path, config, labels, results, rows):
    score = results.get("test") or results["valid"]
    figures = "\n".join(f"| {k} | {v:.4f} |" for k, v in score.items() if isinstance(v, float))
    if path.exists() and _MADE not in path.read_text(encoding="utf-8", errors="replace"):
        raise FileExistsError("one that bertfast did not write is there, and is kept")
    text = f"""---
library_name: transformers
pipeline_tag: text-classification
---
# {path.resolve().parent.name}

`{Path(config.model).name}` {_MADE} on {rows:,} examples ({config.task}),
{results["train"]["step"]} steps of {_step_size(config)}, learning rate
{config.lr:g}, seed {config.seed}. Settings: `run_config.yaml`; data: `data_report.json`.

Classes: {", ".join(labels.names) or "none (regression)"}

| {"test" if "test" in results else "validation"} | |
| --- | --- |
{figures}
"""
    write_text(path, text)
