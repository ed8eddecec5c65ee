"""Scores of pairs: how alike two texts are, or how well a document answers a query."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ... import data
from ...files import StrPath
from .. import heads, inputs, outputs, plots
from ..config import FinetuneConfig, setting
from .base import FinetuneTask
from .classify_inference import HEAD
from .pairs_inference import (
    COLUMNS,
    GOALS,
    evaluate,
    figures,
    inference_arguments,
    predict,
    predict_table,
)

if TYPE_CHECKING:
    from ..packed import Packed

__all__ = ["HELP", "Task", "evaluate", "inference_arguments", "predict", "predict_table"]

HELP = "a number for a pair of texts: similarity, or documents ranked for queries (CrossEncoder)"
_ACTIVATIONS = {  # as sentence-transformers names what makes a score of the output
    "similarity": "torch.nn.modules.linear.Identity",
    "ranking": "torch.nn.modules.activation.Sigmoid",
}


@dataclass
class PairsConfig(FinetuneConfig):
    """What `finetune pairs` does."""

    kind: ClassVar[str] = "pairs"
    NEW: ClassVar[frozenset[str]] = frozenset()

    goal: str = setting(
        "similarity", "similarity: numbers as labels; ranking: relevances, 0 or more"
    )
    text_column: str | None = setting(None, "column of the first text (default: text; or query)")
    text_pair_column: str | None = setting(
        None, "column of the second text (default: text_pair; or document)"
    )
    label_column: str = setting("label", "column of the label, where documents are not in lists")
    positive_weight: float = setting(1.0, "of ranking: weight of relevant documents in the loss")

    def __post_init__(self) -> None:
        self._check("goal", self.goal in GOALS, f"one of {', '.join(GOALS)}")
        super().__post_init__()
        self._check("positive_weight", self.positive_weight > 0, "above 0")
        plain = self.positive_weight == 1 or self.goal == "ranking"
        self._check("positive_weight", plain, "1 unless the goal is ranking")
        first, second = COLUMNS[self.goal]
        self.text_column = self.text_column or first
        self.text_pair_column = self.text_pair_column or second

    def known_metrics(self) -> tuple[str, ...]:
        return GOALS[self.goal]


class PairsTask(FinetuneTask):
    """Pairs of texts and their scores."""

    config: PairsConfig
    Config = PairsConfig
    head = HEAD
    pipeline_tag = "text-ranking"

    def load_part(self, path: StrPath) -> data.Examples:
        config = self.config
        columns = config.text_column, config.text_pair_column, config.label_column
        if config.goal == "ranking":
            found = data.load_candidates(path, *columns)
            if len(found) and not any(found.labels):
                raise data.DataError(
                    f"{path}: no document is relevant to its query (all labels are 0), which "
                    "teaches nothing: look for the right label column"
                )
            return found
        return data.load_classification(path, *columns, task="regression")

    def read(self) -> None:
        super().read()
        if self.config.goal == "ranking":
            self.largest = max(self.parts["train"].labels)
            return
        for name in ("train", "valid"):
            if len({*self.parts[name].labels}) < 2:
                raise data.DataError(
                    f"{self.parts[name].path}: all labels of {name} are "
                    f"{self.parts[name].labels[0]:g}: similarity needs pairs that differ in it"
                )

    def build(self, folder: Path) -> nn.Module:
        labels = data.LabelSet((), "regression")
        allow = self.config.allow_pickle
        options = {"allow_pickle": allow, "say": self.say}
        model, _ = heads.load(folder, HEAD, labels, self.config.head, **options)
        more = getattr(model.config, "sentence_transformers", None) or {}
        activation = _ACTIVATIONS[self.config.goal]
        model.config.sentence_transformers = {**more, "activation_fn": activation}
        # A number that is learnt by its probability is no regression for who trains it further.
        model.config.problem_type = "regression" if self.config.goal == "similarity" else None
        return model

    def check(self, folder: Path) -> None:
        length = inputs.check(self.tokenizer, self.model, folder, self.config.max_length, True)
        self.tokenizer.model_max_length = length  # which a CrossEncoder cuts pairs to

    def report(self) -> data.Report:
        parts = [self.parts.get(name) for name in ("train", "valid", "test")]
        return data.dataset_report(*parts, self.tokenizer, self.config.max_length)

    def encode(self, examples: data.Examples) -> list[dict]:
        rows = data.encode(self.tokenizer, examples.texts, examples.pairs, self.config.max_length)
        scale = 1 / self.largest if self.config.goal == "ranking" else 1
        for row, label in zip(rows, examples.labels, strict=True):
            row["labels"] = float(label) * scale
        return rows

    def loss(self, model: nn.Module, batch: "Packed") -> torch.Tensor:
        """Squared errors, or the cross entropy of relevances as shares of the largest."""
        scores, targets = self.logits(model, batch)[:, 0].float(), batch.targets.float()
        if self.config.goal == "similarity":
            losses = F.mse_loss(scores, targets, reduction="none")
        else:
            weight = torch.full_like(scores[:1], self.config.positive_weight)
            losses = F.binary_cross_entropy_with_logits(
                scores, targets, reduction="none", pos_weight=weight
            )
        return losses.sum() if batch.real is None else torch.where(batch.real > 0, losses, 0).sum()

    def figures(self, name: str, found: list[np.ndarray], brief: bool = False) -> dict:
        return figures(np.stack(found)[:, 0], self.parts[name], self.config.goal)

    def draw(self, out: Path, found: dict[str, list[np.ndarray]], results: dict) -> None:
        name = "test" if "test" in found else "valid"
        labels = np.asarray(self.parts[name].labels)
        with outputs.optional(out / "scores.png") as path:
            plots.scores(np.stack(found[name])[:, 0], labels, self.config.goal, path)

    def card(self) -> str:
        if self.config.goal == "similarity":
            return "Its one output is the similarity, on the labels' scale."
        return "Its one output's sigmoid is the relevance; `CrossEncoder` ranks by it."


Task = PairsTask
