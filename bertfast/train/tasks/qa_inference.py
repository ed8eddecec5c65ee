"""Fine-tuned question answering at work: `evaluate`, `predict`."""

import argparse
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ... import data
from ...data.questions import Questions, load_questions, read_questions
from ...data.spans import QuestionWindows, question_windows
from ...model import checkpoint
from ...model.token_heads import BertForQuestionAnswering
from ...progress import Progress, Say
from .. import answers, networks, opening
from ..config import ConfigError
from ..inputs import as_trained, check
from ..outputs import DECISION, say
from ..trained import Trained

HEAD = opening.Head("QuestionAnswering", BertForQuestionAnswering, "qa_outputs", True)
_LENGTHS = ("max_length", "stride", "max_query_length", "max_answer_length", "n_best")


def scored(
    questions: Questions,
    windows: QuestionWindows,
    found: list[np.ndarray],
    predicted: Sequence[Any],
    threshold: float | None,
    brief: bool = False,
) -> dict:
    """The metrics of predictions; their scores by SQuAD 1.1's script where every question has an
    answer and gets one, else by SQuAD 2's."""
    gold = [[a.text for a in own] for own in questions.answers]
    answerable = np.array([bool(own) for own in gold])
    null = threshold is not None or not answerable.all()
    chosen = [p.answer(math.inf if threshold is None else threshold) for p in predicted]
    exact, f1 = answers.raw_scores(answers.texts(questions, chosen), gold, null)
    out = {"loss": answers.mean_loss(found, windows.targets)}
    out |= answers.summary(exact, f1, answerable, null)
    if brief:
        return out
    counts = {"questions": len(questions), "unanswerable": int((~answerable).sum())}
    counts |= {"without_prediction": sum(c is None for c in chosen), "windows": len(windows)}
    return out | {"counts": counts, "decision": {"null_threshold": threshold}}


class Answerer(Trained):
    """A fine-tuned model, and how long its windows and answers are."""

    def __init__(
        self,
        model: str,
        allow_pickle: bool,
        device: str | None,
        precision: str | None,
        **lengths: int | None,
    ) -> None:
        super().__init__(model, HEAD, allow_pickle, device, precision)
        known = as_trained(self.folder, "qa", **{name: lengths.get(name) for name in _LENGTHS})
        limits = {"max_answer_length": 1, "n_best": 1, "max_query_length": 1, "stride": 0}
        for name, least in limits.items():
            if known[name] < least:
                raise ConfigError(f"{name} is {known[name]}, expected {least} or more")
        self.limits = {name: known[name] for name in ("n_best", "max_answer_length")}
        self.windowing = {name: known[name] for name in ("stride", "max_query_length")}
        self.windowing["max_length"] = check(
            self.tokenizer, self.model, self.folder, known["max_length"], pairs=True
        )
        self.threshold = self.decision.get("null_threshold")
        good = self.threshold is None or isinstance(self.threshold, int | float)
        if not good or isinstance(self.threshold, bool):
            raise checkpoint.CheckpointError(
                f"{self.folder / DECISION} has the null_threshold {self.threshold!r}, expected a "
                "number, or null for answers to every question"
            )

    def given_threshold(self, value: str | float | None) -> None:
        """What the caller says: a number, "none" for answers to every question; None: nothing."""
        if value is None:
            return
        try:
            self.threshold = None if value == "none" else float(value)
        except ValueError:
            self.threshold = math.nan
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ConfigError(f"null_threshold is {value!r}, expected a number or none")

    def windows(self, questions: Questions, warn: bool = True) -> QuestionWindows:
        """Says which questions are cut."""
        found = question_windows(self.tokenizer, questions, **self.windowing)
        if found.cut and warn:
            say(
                f"warning: {len(found.cut)} questions are cut to "
                f"{self.windowing['max_query_length']} tokens, the first in "
                f"{questions.place(found.cut[0])}"
            )
        return found

    def logits(
        self, questions: Questions, windows: QuestionWindows, tokens: int = networks.EVAL_TOKENS
    ) -> list[np.ndarray]:
        """fp32 [tokens, 2] of each window."""
        return self.outputs(windows.rows, lambda i: questions.place(windows.question[i]), tokens)


def evaluate(
    model: str,
    path: str,
    *,
    question_column: str | None = None,
    context_column: str | None = None,
    answers_column: str | None = None,
    id_column: str | None = None,
    max_length: int | None = None,
    stride: int | None = None,
    max_query_length: int | None = None,
    max_answer_length: int | None = None,
    n_best: int | None = None,
    null_threshold: str | float | None = None,
    allow_pickle: bool = False,
    device: str | None = None,
    precision: str | None = None,
) -> dict:
    """Exact match and F1 of a fine-tuned model, from 0 to 1, as SQuAD's scripts count them: of all
    questions, and of those that have an answer and those that have none. Columns and lengths that
    are None are those that it was trained with. `null_threshold` is the one found in training; a
    model of another's making has 0 where the data have questions without an answer. `precision` is
    `bertfast.freeze`'s, on a CPU."""
    lengths = {"max_length": max_length, "stride": stride, "max_query_length": max_query_length}
    lengths |= {"max_answer_length": max_answer_length, "n_best": n_best}
    given = Answerer(model, allow_pickle, device, precision, **lengths)
    columns = {"question_column": question_column, "context_column": context_column}
    columns |= {"answers_column": answers_column, "id_column": id_column}
    questions = load_questions(path, **as_trained(given.folder, "qa", **columns))
    if not len(questions):
        raise data.DataError(f"{path} has no rows")
    given.given_threshold(null_threshold)
    unknown = "null_threshold" not in given.decision and null_threshold is None
    if unknown and not all(questions.answers):
        say(f"note: {given.folder} has no {DECISION}: null_threshold is 0")
        given.threshold = 0.0
    windows = given.windows(questions)
    found = given.logits(questions, windows)
    null = given.threshold is not None
    predicted = answers.decode(found, windows, **given.limits, null=null)
    return scored(questions, windows, found, predicted, given.threshold)


def predict_table(
    model: str,
    path: str,
    *,
    question_column: str | None = None,
    context_column: str | None = None,
    id_column: str | None = None,
    max_length: int | None = None,
    stride: int | None = None,
    max_query_length: int | None = None,
    max_answer_length: int | None = None,
    n_best: int | None = None,
    null_threshold: str | float | None = None,
    alternatives: int = 0,
    allow_pickle: bool = False,
    device: str | None = None,
    precision: str | None = None,
    batch_tokens: int = networks.EVAL_TOKENS,
    say: Say | None = None,
) -> Iterator[dict]:
    """The answers of a table's questions (or SQuAD's JSON), in their order, while it is read:
    {"id", "answer", "start", "end", "context", "score", "probability", "null_score"}.

    start and end count Unicode code points of the context of that number, from 0, as given. Where
    there is no answer, it is "" and its places are None, and so is the null_score of a model that
    answers every question. Of `alternatives` as many best spans are added as "n_best", at most
    `n_best`, among which the probabilities are. Columns and lengths as in `evaluate`. The model is
    loaded and checked by the call; what is wrong with the table raises when its rows are asked for.
    """
    if batch_tokens < 1:
        raise ConfigError(f"batch_tokens is {batch_tokens}, expected 1 or more")
    if alternatives < 0:
        raise ConfigError(f"alternatives is {alternatives}, expected 0 or more")
    lengths = {"max_length": max_length, "stride": stride, "max_query_length": max_query_length}
    lengths |= {"max_answer_length": max_answer_length, "n_best": n_best}
    given = Answerer(model, allow_pickle, device, precision, **lengths)
    given.given_threshold(null_threshold)
    columns = {"question_column": question_column, "context_column": context_column}
    columns = as_trained(given.folder, "qa", **columns, id_column=id_column)

    def encoded():
        for questions in read_questions(path, **columns):
            yield questions, given.windows(questions)

    def rows():
        progress = Progress(say)
        for questions, windows in data.ahead(encoded()):
            found = given.logits(questions, windows, batch_tokens)
            null = given.threshold is not None
            predicted = answers.decode(found, windows, **given.limits, null=null)
            for i, prediction in enumerate(predicted):
                yield _row(questions, i, prediction, given.threshold, alternatives)
            progress.step(len(questions), questions.total)

    return rows()


def _row(questions, i, prediction, threshold, alternatives) -> dict:
    probabilities, none = prediction.probabilities()
    chosen = prediction.answer(math.inf if threshold is None else threshold)
    spans = [
        _span(questions, i, span, p)
        for span, p in zip(prediction.spans, probabilities, strict=True)
    ]
    empty = dict.fromkeys(("start", "end", "context"))
    empty = {"answer": "", **empty, "score": prediction.null, "probability": none}
    out = {"id": questions.ids[i], **(spans[0] if chosen else empty), "null_score": prediction.null}
    if alternatives:
        out["n_best"] = spans[:alternatives]
    return out


def _span(questions, i, span, probability) -> dict:
    (text,) = answers.texts(questions.select([i]), [span])
    places = {"start": span.start, "end": span.end, "context": span.context}
    return {"answer": text, **places, "score": span.score, "probability": probability}


def inference_arguments(parser: argparse.ArgumentParser, labelled: bool) -> None:
    """`evaluate`'s (labelled) and `predict_table`'s settings as options."""
    names = ["question", "context", *["answers"] * labelled, "id"]
    for name in names:
        text = f"column of the {name} (default: the one trained with, or {name})"
        parser.add_argument(f"--{name}-column", metavar="COLUMN", help=text)
    for name, text in (
        ("max-length", "tokens of a window"),
        ("stride", "tokens that a window shares with the one before"),
        ("max-query-length", "tokens a question is cut to"),
        ("max-answer-length", "tokens of the longest answer that is looked for"),
        ("n-best", "answers that are compared"),
    ):
        text += " (default: as trained with)"
        parser.add_argument(f"--{name}", type=int, metavar="N", help=text)
    text = "give no answer where its score is more than X above the best span's, or 'none' to "
    text += "answer every question (default: what did best in validation)"
    parser.add_argument("--null-threshold", metavar="X", help=text)
    if not labelled:
        text = "add the best N spans of each question"
        parser.add_argument("--alternatives", type=int, default=0, metavar="N", help=text)
