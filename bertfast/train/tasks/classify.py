"""Classification (single- and multi-label, pairs) and regression."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ... import data
from ...files import StrPath
from .. import heads, inputs, metrics, outputs, plots
from ..config import METRICS, ConfigError, FinetuneConfig, setting
from ..packed import IGNORED, Packed
from ..private import settings
from .base import FinetuneTask
from .classify_inference import HEAD, evaluate, inference_arguments, predict_table, scored

__all__ = ["HELP", "Task", "evaluate", "inference_arguments", "predict_table"]

HELP = "classes of texts or pairs, or numbers: single- and multi-label, regression"


@dataclass
class ClassifyConfig(FinetuneConfig):
    """What `finetune classify` does."""

    kind: ClassVar[str] = "classify"
    NEW: ClassVar[frozenset[str]] = frozenset({"batch_tokens", "head", "thresholds", *settings.OFF})

    task: str = setting("single_label", "kind of labels")
    text_column: str = setting("text", "column of the text")
    text_pair_column: str | None = setting(None, "column of the second text of a pair")
    label_column: str = setting("label", "column of the label")
    dedup: bool = setting(False, "keep only the first of equal texts in each file")
    class_weights: dict[str, float] = setting(dict, "label=weight in the loss, others 1")
    thresholds: bool = setting(
        False,
        "of multi_label: for each class the probability that does best in validation",
    )
    dp_epsilon: float | None = setting(None, "train privately, by DP-SGD with this budget")
    dp_delta: float | None = setting(None, "the chance that dp_epsilon's promise fails")
    dp_clip: float = setting(settings.OFF["dp_clip"], "norm an example's gradient is clipped to")

    def __post_init__(self) -> None:
        self.text_pair_column = self.text_pair_column or None
        metric = self.metric
        super().__post_init__()
        for name, only in (("class_weights", "single_label"), ("thresholds", "multi_label")):
            good = self.task == only or not getattr(self, name)
            self._check(name, good, f"none unless the task is {only}")
        self.check_weights("class_weights")
        settings.check(self, metric)

    def known_metrics(self) -> tuple[str, ...]:
        return METRICS[self.task]


class ClassificationTask(FinetuneTask):
    """Texts and their classes, or numbers."""

    config: ClassifyConfig
    Config = ClassifyConfig
    head = HEAD
    pipeline_tag = "text-classification"
    labels = class_weights = on_device = None

    def load_part(self, path: StrPath) -> data.Examples:
        config = self.config
        return data.load_classification(
            path,
            text_column=config.text_column,
            text_pair_column=config.text_pair_column,
            label_column=config.label_column,
            task=config.task,
            dedup=config.dedup,
        )

    def read(self) -> None:
        super().read()
        valid = self.parts["valid"]
        if self.config.metric in ("r2", "pearson") and len(set(valid.labels)) < 2:
            self.say(
                f"warning: there is no {self.config.metric} of validation labels that are all "
                f"{valid.labels[0]} (rows: {len(valid)}): the loss picks the best evaluation"
            )
            self.config.metric = "loss"

    def build(self, folder: Path) -> nn.Module:
        config, train = self.config, self.parts["train"]
        labels = data.LabelSet.from_examples(train)
        options = {"flags": train.width is not None, "allow_pickle": config.allow_pickle}
        options["say"] = self.say
        model, labels = heads.load(folder, self.head, labels, config.head, **options)
        self.name(labels)
        return model

    def name(self, labels: data.LabelSet) -> None:
        """Take the classes in the order of the model's outputs."""
        self.labels, given = labels, self.config.class_weights
        if not given:
            return
        given = {data.normal(name): w for name, w in given.items()}
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
        self.on_device = self.class_weights.to(self.device)

    def check(self, folder: Path) -> None:
        pairs = self.parts["train"].pairs is not None
        inputs.check(self.tokenizer, self.model, folder, self.config.max_length, pairs)

    def report(self) -> data.Report:
        parts = [self.parts.get(name) for name in ("train", "valid", "test")]
        return data.dataset_report(*parts, self.tokenizer, self.config.max_length)

    def encode(self, examples: data.Examples) -> list[dict]:
        return inputs.encoded_rows(self.tokenizer, examples, self.labels, self.config.max_length)

    def weight(self, batch: Packed) -> float:
        if self.class_weights is not None:
            return float(self.class_weights[batch.targets].sum())
        return float(batch.targets.numel())

    def loss(self, model: nn.Module, batch: Packed) -> torch.Tensor:
        return self.summed_loss(self.logits(model, batch).float(), batch.targets, batch.real)

    def summed_loss(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        real: torch.Tensor | None = None,
        reduction: str = "sum",
    ) -> torch.Tensor:
        """targets: `IGNORED` of what counts for nothing, or numbers. real: int64 [sequences]: 0
        where numbers do; None where all count. reduction: torch's."""
        if self.config.task == "single_label":
            more = {"weight": self.on_device, "ignore_index": IGNORED}
            return F.cross_entropy(logits, targets, reduction=reduction, **more)
        reduction, targets = reduction if real is None else "none", targets.float()
        if self.config.task == "regression":
            losses = F.mse_loss(logits[:, 0], targets, reduction=reduction)
        else:
            losses = F.binary_cross_entropy_with_logits(logits, targets, reduction=reduction)
        if real is None:
            return losses
        return torch.where(real.unsqueeze(1) > 0, losses.view(len(real), -1), 0).sum()

    def tune(self, found: list[np.ndarray]) -> dict:
        if not self.config.thresholds:
            return {}
        targets = np.array([row["labels"] for row in self.rows["valid"]])
        best = metrics.best_thresholds(np.stack(found), targets)
        return {"thresholds": dict(zip(self.labels.names, best, strict=True))}

    def figures(self, name: str, found: list[np.ndarray], brief: bool = False) -> dict:
        rows, logits = self.rows[name], np.stack(found)
        if not brief:
            return scored(logits, rows, self.labels, self.decision)
        targets = np.array([row["labels"] for row in rows])
        loss = metrics.mean_loss(logits, targets, self.config.task)
        return metrics.summary(logits, targets, self.config.task, loss)

    def draw(self, out: Path, found: dict[str, list[np.ndarray]], results: dict) -> None:
        if self.config.task != "single_label":
            return
        name = "test" if "test" in found else "valid"
        truth = [row["labels"] for row in self.rows[name]]
        predicted = metrics.predicted(np.stack(found[name]), self.config.task)
        with outputs.optional(out / "confusion_matrix.png"):
            plots.confusion_matrix(truth, predicted, self.labels.names, out)

    def card(self) -> str:
        return f"Classes: {', '.join(self.labels.names) or 'none (regression)'}"


Task = ClassificationTask
