"""Answers of start and end logits over windows, and how good they are, as SQuAD's scripts say."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..data.questions import Questions
from ..data.spans import NOWHERE, QuestionWindows

_CHUNK = 256  # windows whose spans are scored together
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Span(NamedTuple):
    """Characters start to end of the question's context number `context`; score: the sum of the
    two logits."""

    score: float
    start: int
    end: int
    context: int


@dataclass
class Prediction:
    """A question's best spans, no two with the same characters, the best first; and the score of
    no answer, None where every question has one."""

    spans: list[Span]
    null: float | None = None

    @property
    def diff(self) -> float | None:
        """By how much no answer scores better than the best span."""
        if self.null is None:
            return None
        return self.null - self.spans[0].score if self.spans else np.inf

    def answer(self, threshold: float = 0.0) -> Span | None:
        """The best span, unless `diff` is above the threshold (or there is none)."""
        if not self.spans or (self.null is not None and self.diff > threshold):
            return None
        return self.spans[0]

    def probabilities(self) -> tuple[list[float], float | None]:
        """A softmax over the spans and no answer: of each span, and of no answer."""
        scores = np.array([s.score for s in self.spans] + [self.null] * (self.null is not None))
        if not len(scores):
            return [], None
        e = np.exp(scores - scores.max())
        p = (e / e.sum()).tolist()
        return p[: len(self.spans)], None if self.null is None else p[-1]


def decode(
    logits: list[np.ndarray],
    windows: QuestionWindows,
    *,
    n_best: int = 20,
    max_answer_length: int = 30,
    null: bool = True,
) -> list[Prediction]:
    """The `n_best` spans of each question over all windows of all its contexts.

    Spans stand in a context and have up to `max_answer_length` tokens. All of them are looked at;
    the official scripts look at those between a window's n_best first and last tokens alone. No
    answer scores what the first token does in the window where that is least; it is one of the
    n_best, and always among them.

    Args:
        logits: of each window [tokens, 2], of the answer's start and of its end.

    Raises: ValueError where a logit is not finite.
    """
    count = int(windows.question.max(initial=-1)) + 1
    nulls = np.full(count, np.inf)
    parts = []
    for first in range(0, len(windows), _CHUNK):
        part = range(first, min(first + _CHUNK, len(windows)))
        longest = max(len(windows.starts[i]) for i in part)
        chars = np.full((2, len(part), longest), NOWHERE, np.int64)
        values = np.zeros((2, len(part), longest))
        for row, i in enumerate(part):
            own = len(windows.starts[i])
            chars[:, row, :own] = windows.starts[i], windows.ends[i]
            values[:, row, :own] = logits[i].T
        if not np.isfinite(values).all():
            raise ValueError("logits are not finite: no answer can be found by them")
        np.minimum.at(nulls, windows.question[first : part.stop], values[:, :, 0].sum(0))
        rows, begin, end, scores = _best(*values, chars[0] != NOWHERE, n_best, max_answer_length)
        of = windows.question[first + rows], windows.context[first + rows]
        parts.append((*of, chars[0, rows, begin], chars[1, rows, end], scores))
    if not parts:
        return []
    spans = _merged(*map(np.concatenate, zip(*parts, strict=True)), n_best)
    return _predictions(*spans, nulls if null else None, count, n_best)


def _best(starts, ends, inside, n_best, longest):
    """Window, first token, last token and score of the best spans of each window; those of a
    window include its n_best best."""
    starts, ends = (np.where(inside, x, -np.inf) for x in (starts, ends))
    size = starts.shape[1]
    longest = min(longest, size)
    padded = np.pad(ends, ((0, 0), (0, longest - 1)), constant_values=-np.inf)
    reach = padded[:, :size].copy()  # the best end from each token on
    for k in range(1, longest):
        np.maximum(reach, padded[:, k : k + size], out=reach)
    # The n_best spans begin at n_best tokens at most: those that reach the best spans.
    begin = _top(starts + reach, n_best)
    rows = np.arange(len(starts))[:, None]
    ending = begin[:, :, None] + np.arange(longest)
    scores = starts[rows, begin][:, :, None] + padded[rows[:, :, None], ending]
    scores = scores.reshape(len(starts), -1)
    kept = _top(scores, n_best)
    scores = scores[rows, kept]
    begin, ending = begin[rows, kept // longest], kept % longest
    real = scores > -np.inf
    rows = np.broadcast_to(rows, real.shape)
    return rows[real], begin[real], (begin + ending)[real], scores[real]


def _top(values, n) -> np.ndarray:
    """Where each row's n largest are, in no order."""
    if n >= values.shape[1]:
        return np.broadcast_to(np.arange(values.shape[1]), values.shape)
    return np.argpartition(-values, n - 1, axis=1)[:, :n]


def _merged(question, context, begin, end, scores, n_best):
    """Spans of all windows, each once, by question from best to worst, n_best of a question."""
    order = np.lexsort((-scores, end, begin, context, question))
    columns = [x[order] for x in (question, context, begin, end)]
    new = np.ones(len(order), bool)
    new[1:] = np.any([x[1:] != x[:-1] for x in columns], axis=0)
    order = order[new]
    order = order[np.lexsort((-scores[order], question[order]))]
    of = question[order]
    rank = np.arange(len(of)) - np.searchsorted(of, of)
    order = order[rank < n_best]
    return tuple(x[order] for x in (question, context, begin, end, scores))


def _predictions(question, context, begin, end, scores, nulls, count, n_best):
    edges = np.searchsorted(question, np.arange(count + 1))
    columns = (scores, begin, end, context)
    spans = [Span(*row) for row in zip(*(x.tolist() for x in columns), strict=True)]
    found = []
    for i in range(count):
        own = spans[edges[i] : edges[i + 1]]
        null = None if nulls is None else float(nulls[i])
        if null is not None and len(own) == n_best > 1 and own[-1].score < null:
            own.pop()  # no answer is among the n best
        found.append(Prediction(own, null))
    return found


def texts(questions: Questions, spans: list[Span | None]) -> list[str]:
    """What each question's span says; "" of None."""
    pairs = zip(questions.contexts, spans, strict=True)
    return ["" if s is None else contexts[s.context][s.start : s.end] for contexts, s in pairs]


def mean_loss(logits: list[np.ndarray], targets: np.ndarray) -> float:
    """The mean over windows of the cross entropies of start and end, themselves a mean of two."""
    total = 0.0
    for values, target in zip(logits, targets, strict=True):
        values = values.astype(np.float64)
        high = values.max(0)
        total += (np.log(np.exp(values - high).sum(0)) + high - values[target, [0, 1]]).mean()
    return total / max(len(targets), 1)


def normalize(text: str) -> str:
    """What counts of an answer: lower case, no ASCII punctuation, no English articles, single
    spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def raw_scores(
    predicted: Sequence[Any], answers: Sequence[Any], null: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Exact match and F1 of each predicted text ("" for no answer) with the best fitting of its
    question's answers (lists of texts, empty where there is none): float64 [n] each.

    null: as SQuAD 2's script does, otherwise as SQuAD 1.1's; they differ in texts of which
    `normalize` leaves nothing.
    """
    exact, f1 = np.zeros((2, len(predicted)))
    for i, (text, gold) in enumerate(zip(predicted, answers, strict=True)):
        text, gold = normalize(text), [normalize(g) for g in gold]
        if null:
            gold = list(filter(None, gold)) or [""]
        exact[i] = float(text in gold)
        f1[i] = max((_f1(text.split(), g.split(), null) for g in gold), default=0.0)
    return exact, f1


def _f1(text: list[str], gold: list[str], null: bool) -> float:
    if null and not (text and gold):
        return float(text == gold)
    same = sum((Counter(text) & Counter(gold)).values())
    if not same:
        return 0.0
    precision, recall = same / len(text), same / len(gold)
    return 2 * precision * recall / (precision + recall)


def summary(exact: np.ndarray, f1: np.ndarray, answerable: np.ndarray, null: bool) -> dict:
    """Means of `raw_scores`, from 0 to 1: of all, and with `null` also of the questions that have
    an answer and of those that have none, where there are such."""
    out = {"exact_match": float(exact.mean()), "f1": float(f1.mean())}
    for name, part in (("has_answer", answerable), ("no_answer", ~answerable)):
        if null and part.any():
            out |= {f"{name}_exact_match": float(exact[part].mean())}
            out |= {f"{name}_f1": float(f1[part].mean())}
    return out


def best_threshold(
    diffs: np.ndarray, scores: np.ndarray, answerable: np.ndarray
) -> tuple[float, float]:
    """The threshold of `diffs` at which the mean of the scores is best, and that mean, by the sweep
    of SQuAD 2's script: the first of the best, among equal diffs in their order.

    Where giving no answer at all is best, the threshold is below every diff; that script then has
    0, of probabilities a number that nothing is below.

    Args:
        diffs: [n], `Prediction.diff`, of one question or more.
        scores: [n], of each question's best span, whatever no answer scores (`raw_scores`).
        answerable: bool [n].
    """
    diffs, answerable = np.asarray(diffs, np.float64), np.asarray(answerable, bool)
    order = np.argsort(diffs, kind="stable")
    gains = np.where(answerable, scores, -1.0)[order]  # the best span is never an empty text
    totals = np.cumsum(np.append(np.sum(~answerable), gains))
    best = int(totals.argmax())
    threshold = diffs[order[best - 1]] if best else np.nextafter(diffs[order[0]], -np.inf)
    return float(threshold), float(totals[best]) / len(diffs)
