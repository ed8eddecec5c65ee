"""Tagging words: named entities, parts of speech."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ... import data
from ...data.aligned import Aligned, align, check_shared
from ...data.tag_schemes import SCHEMES, parts
from ...data.tagged import Tagged, load_tagged
from ...data.tagged_report import Report, tagged_report
from ...data.text_spans import signed_forms
from ...files import StrPath
from ...progress import Say
from .. import heads, inputs, opening, outputs
from ..config import ConfigError, FinetuneConfig, setting
from ..packed import IGNORED, Packed
from . import tokens_plots as plots
from .base import FinetuneTask
from .tokens_inference import (
    COLUMNS,
    HEAD,
    check_strategy,
    columns_of,
    evaluate,
    inference_arguments,
    predict,
    predict_table,
    stride_of,
)
from .tokens_words import Encoded, Tags, encoded, scored, words_tagged

__all__ = ["HELP", "Task", "evaluate", "inference_arguments", "predict", "predict_table"]

HELP = "tags of words: named entities, parts of speech"


@dataclass
class TokensConfig(FinetuneConfig):
    """What `finetune tokens` does."""

    kind: ClassVar[str] = "tokens"
    metrics: ClassVar[tuple[str, ...]] = (
        *("micro_f1", "macro_f1", "weighted_f1", "precision", "recall", "accuracy", "loss"),
    )
    NEW: ClassVar[frozenset[str]] = frozenset()

    tokens_column: str | None = setting(None, "column of a row's words (default: tokens)")
    tags_column: str | None = setting(None, "column of the words' tags (default: tags)")
    text_column: str | None = setting(None, "column of a text, in place of words (default: text)")
    entities_column: str | None = setting(
        None, "column of a text's entities (default: entities or spans)"
    )
    scheme: str | None = setting(
        None, "iob1, iob2, bioes, bilou or plain, where the tags don't say (default: they do)"
    )
    label_all: bool = setting(False, "learn from all sub-words of a word, not its first alone")
    strategy: str = setting(
        "first", "what of a word's sub-words decides: first, average or max, as in pipelines"
    )
    spaced: bool | None = setting(
        None, "read words apart, with a space between (default: as the rows are given)"
    )
    stride: int | None = setting(
        None, "tokens that neighbouring windows of a long row share (default: max_length / 4)"
    )
    class_weights: dict[str, float] = setting(dict, "tag=weight or type=weight in the loss, else 1")

    def __post_init__(self) -> None:
        for name in COLUMNS:
            setattr(self, name, getattr(self, name) or None)
        super().__post_init__()
        check_strategy(self.strategy)
        known = self.scheme is None or self.scheme in SCHEMES
        self._check("scheme", known, f"one of {', '.join(SCHEMES)}")
        good = self.stride is None or 0 <= self.stride < self.max_length
        self._check("stride", good, f"0 to max_length - 1, {self.max_length - 1}")
        self.check_weights("class_weights")


class TokensTask(FinetuneTask):
    """Words and their tags."""

    config: TokensConfig
    Config = TokensConfig
    head = HEAD
    pipeline_tag = "token-classification"
    tags = class_weights = on_device = None

    def __init__(self, config: TokensConfig, device: torch.device, say: Say = print) -> None:
        super().__init__(config, device, say)
        self.aligned: dict[str, Aligned] = {}
        self.encoded: dict[str, Encoded] = {}
        # Whether all sub-words have outputs, or each word's first alone.
        self.every = config.label_all or config.strategy != "first"

    def load_part(self, path: StrPath) -> Tagged:
        columns = {name: getattr(self.config, name) for name in COLUMNS}
        return load_tagged(path, self.config.scheme, **columns_of(path, columns))

    def read(self) -> None:
        super().read()
        train = self.parts["train"]
        if self.config.spaced is None:  # for predictions later, whatever they are of
            self.config.spaced = train.texts is None
        for name, part in self.parts.items():
            if part.plain != train.plain and any(part.kinds()):
                kinds = ("entities", "plain tags")
                raise data.DataError(
                    f"{part.path} has {kinds[part.plain]}, {train.path} {kinds[train.plain]}: give "
                    f"train and {name} of one kind, or --scheme plain"
                )

    def build(self, folder: Path) -> nn.Module:
        config = self.config
        labels = data.LabelSet(self._names(folder))
        options = {"allow_pickle": config.allow_pickle, "say": self.say}
        model, labels = heads.load(folder, self.head, labels, config.head, **options)
        self.name(labels.names)
        return model

    def _names(self, folder) -> tuple[str, ...]:
        """The tags of the training data, each type with B- and I-; of the checkpoint's head, where
        it has them all and more."""
        train = self.parts["train"]
        names = {tag for row in train.tags for tag in row}
        if len(names) < 2:
            raise data.DataError(f"{train.path}: all tags are {min(names)}; expected 2 or more")
        if not train.plain:
            kinds = {kind for row in train.kinds() for kind in row}
            names = {"O"} | {f"{letter}-{kind}" for letter in "BI" for kind in kinds}
        config = opening.read_configuration(folder)
        own = tuple(str(name) for name in config.id2label.values())
        kept = self.config.head == "auto" and self.head.of_another(config) is None
        return own if kept and names < {*own} else tuple(sorted(names))

    def name(self, names: Sequence[str]) -> None:
        """Take the tags in the order of the model's outputs."""
        self.tags, given = Tags(names), self.config.class_weights
        if not given:
            return
        known = {*names} | {parts(name)[1] for name in names} - {""}
        unknown = sorted({*given} - known)
        if unknown:
            raise ConfigError(
                f"class_weights names {', '.join(unknown)}, which no word has; known are "
                f"{', '.join(sorted(known))}"
            )
        weight = lambda name: given.get(name, given.get(parts(name)[1], 1))
        self.class_weights = torch.tensor([float(weight(name)) for name in names])
        if not self.class_weights.any():
            raise ConfigError("class_weights are 0 for all tags, expected one above 0")
        self.on_device = self.class_weights.to(self.device)

    def check(self, folder: Path) -> None:
        config = self.config
        inputs.check(self.tokenizer, self.model, folder, config.max_length, pairs=False)
        for name, part in self.parts.items():
            self.tags.encode(part)  # that all are known
            self.aligned[name] = align(
                self.tokenizer,
                part,
                max_length=config.max_length,
                stride=stride_of(config.stride, config.max_length),
                spaced=config.spaced,
            )
            check_shared(self.aligned[name], part)

    def report(self) -> Report:
        return tagged_report(self.parts, self.aligned, self.tokenizer, self.config.max_length)

    def encode(self, examples: Tagged) -> list[dict]:
        name = next(name for name, part in self.parts.items() if part is examples)
        tags = self.tags.encode(examples)
        own = encoded(self.aligned[name], self.every, tags, self.config.label_all)
        if name == "train" and not own.rows:
            raise data.DataError(f"{examples.path}: no word has a token of this tokenizer")
        self.encoded[name] = own
        return own.rows

    def weight(self, batch: Packed) -> float:
        real = batch.labels[batch.labels != IGNORED]
        if self.class_weights is not None:
            return float(self.class_weights[real].sum())
        return float(len(real))

    def loss(self, model: nn.Module, batch: Packed) -> torch.Tensor:
        logits = self.logits(model, batch).float()
        more = {"weight": self.on_device, "ignore_index": IGNORED}
        return F.cross_entropy(logits, batch.labels, reduction="sum", **more)

    def tune(self, found: list[np.ndarray]) -> dict:
        """Of words the forms that texts are not to be split within, so that they are read alike."""
        train = self.parts["train"]
        forms = signed_forms(train.words) if train.texts is None else []
        return {"forms": forms} if forms else {}

    def figures(self, name: str, found: list[np.ndarray], brief: bool = False) -> dict:
        how = self.tags, self.config.strategy, self.every
        return scored(self.encoded[name], found, self.parts[name], *how, brief=brief)

    def draw(self, out: Path, found: dict[str, list[np.ndarray]], results: dict) -> None:
        if self.tags.plain:
            return
        name = "test" if "test" in found else "valid"
        part, own = self.parts[name], found[name]
        with outputs.optional(out / "entity_f1.png") as path:
            plots.entity_f1(results[name]["per_type"], path)
        with outputs.optional(out / "entity_scores.png") as path:
            how = self.tags, self.config.strategy, self.every
            chosen = words_tagged(self.encoded[name], own, part, *how)
            plots.score_histogram(part.tags, chosen, path)

    def card(self) -> str:
        config, names = self.config, ", ".join(self.tags.names)
        if self.tags.plain:
            return f"Tags: {names}"
        apart = "words with a space between" if config.spaced else "texts as they are"
        return (
            f"Tags: {names} (IOB2), of {apart}. As transformers' pipeline: "
            f'`pipeline("token-classification", aggregation_strategy="{config.strategy}")`.'
        )


Task = TokensTask
__all__ += ["TokensConfig", "TokensTask"]
