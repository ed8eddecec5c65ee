"""Extractive question answering: the span of a context that answers a question, or none."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ... import data
from ...data.question_report import QuestionReport, question_report
from ...data.questions import Questions, load_questions
from ...data.spans import question_windows
from ...files import StrPath
from ...progress import Say
from .. import answers, inputs, opening, outputs
from ..answer_plots import score_diffs
from ..config import FinetuneConfig, setting
from ..packed import IGNORED, Packed
from .base import FinetuneTask
from .qa_inference import HEAD, evaluate, inference_arguments, predict_table, scored

__all__ = ["HELP", "Task", "evaluate", "inference_arguments", "predict_table"]

HELP = "answers of questions, as spans of their contexts: SQuAD 1 and 2"


@dataclass
class QAConfig(FinetuneConfig):
    """What `finetune qa` does."""

    kind: ClassVar[str] = "qa"
    metrics: ClassVar[tuple[str, ...]] = ("f1", "exact_match", "loss")
    NEW: ClassVar[frozenset[str]] = frozenset()

    max_length: int = setting(384, "tokens of a window: a question and a part of its context")
    stride: int = setting(128, "tokens that a window shares with the one before")
    max_query_length: int = setting(64, "tokens a question is cut to")
    max_answer_length: int = setting(30, "tokens of the longest answer that is looked for")
    n_best: int = setting(20, "answers that are compared")
    question_column: str = setting("question", "column of the question")
    context_column: str | None = setting(
        None, "column of the context, or of a list of them (default: context or contexts)"
    )
    answers_column: str | None = setting(None, "column of the answers (default: answers or answer)")
    id_column: str = setting("id", "column of the question's name, if there is one")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("stride", self.stride >= 0, "0 or more")
        for name in ("max_query_length", "max_answer_length", "n_best"):
            self._check(name, getattr(self, name) >= 1, "1 or more")


class QATask(FinetuneTask):
    """Questions over windows of their contexts; the first and the last token of the answer."""

    config: QAConfig
    Config = QAConfig
    head = HEAD
    pipeline_tag = "question-answering"

    def __init__(self, config: QAConfig, device: torch.device, say: Say = print) -> None:
        super().__init__(config, device, say)
        self.windows = {}  # of each part
        self.null = False  # whether a question may have no answer

    def load_part(self, path: StrPath) -> Questions:
        config = self.config
        return load_questions(
            path,
            question_column=config.question_column,
            context_column=config.context_column,
            answers_column=config.answers_column,
            id_column=config.id_column,
        )

    def read(self) -> None:
        super().read()
        none = {name: sum(not a for a in part.answers) for name, part in self.parts.items()}
        train = self.parts["train"]
        if none["train"] == len(train):
            raise data.DataError(f"{train.path}: no question has an answer to learn from")
        self.null = none["train"] > 0
        for name in ("valid", "test"):
            if none.get(name) and not self.null:
                self.say(
                    f"warning: {name}: {none[name]} questions have no answer; all of train have "
                    "one, so the model will always give one"
                )

    def build(self, folder: Path) -> nn.Module:
        config = self.config
        options = config.head, 2, config.allow_pickle
        model, new = opening.pretrained(folder, self.head, *options)
        model.num_labels = model.config.num_labels = 2  # another task's checkpoint has its own
        model.config.problem_type = None
        self.say(f"head: {'new' if new else f'kept from {folder}'}")
        return model

    def check(self, folder: Path) -> None:
        config = self.config
        inputs.check(self.tokenizer, self.model, folder, config.max_length, pairs=True)
        for name, part in self.parts.items():
            self.windows[name] = question_windows(
                self.tokenizer,
                part,
                max_length=config.max_length,
                stride=config.stride,
                max_query_length=config.max_query_length,
            )

    def report(self) -> QuestionReport:
        config = self.config
        lengths = config.max_length, config.max_answer_length
        return question_report(self.parts, self.windows, self.tokenizer, *lengths)

    def encode(self, examples: Questions) -> list[dict]:
        name = next(n for n, part in self.parts.items() if part is examples)
        windows = self.windows[name]
        if name == "train":
            windows.starts = windows.ends = []  # half of the memory, for answers that nobody asks
        pairs = zip(windows.rows, windows.targets, strict=True)
        return [row | {"labels": target} for row, target in pairs]

    def loss(self, model: nn.Module, batch: Packed) -> torch.Tensor:
        return span_loss(self.logits(model, batch).float(), batch)

    def figures(self, name: str, found: list[np.ndarray], brief: bool = False) -> dict:
        part = name, self.parts[name], self.windows[name], found
        predicted = self._predicted(name, found)
        if predicted is None:
            return dict.fromkeys(self.config.metrics, float("nan"))
        decision = self.decision
        if brief or not decision:
            decision = self._tuned(name, predicted)
        return scored(*part[1:], predicted, decision["null_threshold"], brief)

    def _predicted(self, name, found):
        """None of logits that are not finite."""
        if not all(np.isfinite(values).all() for values in found):
            return None
        config = self.config
        limits = {"n_best": config.n_best, "max_answer_length": config.max_answer_length}
        return answers.decode(found, self.windows[name], **limits, null=self.null)

    def _tuned(self, name, predicted) -> dict:
        if not self.null:
            return {"null_threshold": None}
        part = self.parts[name]
        best = [p.spans[0] if p.spans else None for p in predicted]
        _, f1 = answers.raw_scores(
            answers.texts(part, best), [[a.text for a in own] for own in part.answers], True
        )
        answerable = [bool(own) for own in part.answers]
        diffs = [p.diff for p in predicted]
        return {"null_threshold": answers.best_threshold(diffs, f1, answerable)[0]}

    def tune(self, found: list[np.ndarray]) -> dict:
        predicted = self._predicted("valid", found)
        if predicted is None:
            return {"null_threshold": 0.0 if self.null else None}
        return self._tuned("valid", predicted)

    def draw(self, out: Path, found: dict[str, list[np.ndarray]], results: dict) -> None:
        if not self.null:
            return
        name = "test" if "test" in found else "valid"
        predicted = self._predicted(name, found[name])
        if predicted is None:
            return
        answerable = np.array([bool(own) for own in self.parts[name].answers])
        diffs = np.array([p.diff for p in predicted])
        with outputs.optional(out / "score_diffs.png") as path:
            score_diffs(diffs, answerable, self.decision["null_threshold"], path)

    def card(self) -> str:
        config = self.config
        text = (
            f"Answers are spans of up to {config.max_answer_length} tokens, found in windows of "
            f"{config.max_length} tokens that share {config.stride}"
        )
        threshold = self.decision.get("null_threshold")
        if threshold is None:
            return f"{text}; every question gets one."
        return (
            f"{text}; none is given where the score of the first token is more than "
            f"{threshold:.4g} above that of the best span."
        )


def span_loss(logits: torch.Tensor, batch: Packed) -> torch.Tensor:
    """The mean of the cross entropies of starts and ends, each among the tokens of its window,
    summed over windows. logits: fp32 [tokens, 2]."""
    starts, lengths = batch.cu_seqlens[:-1].long(), batch.cu_seqlens.diff()
    places = torch.arange(batch.max_seqlen, device=logits.device)
    inside = places < lengths[:, None]
    index = torch.where(inside, starts[:, None] + places, 0)
    rows = logits[index].masked_fill(~inside[:, :, None], torch.finfo(torch.float32).min)
    return F.cross_entropy(rows, batch.targets, ignore_index=IGNORED, reduction="sum") / 2


Task = QATask
