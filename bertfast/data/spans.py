"""Windows of questions over their contexts, and between which of their tokens an answer stands."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .errors import ConfigError
from .questions import Questions
from .windows import Window, windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 256  # contexts in one call of the tokenizer, whose encodings are large
_SPACES = np.array([c for c in range(0x3001) if chr(c).isspace()])
NOWHERE = -1


@dataclass
class QuestionWindows:
    """Windows of several questions, each of one context of one question; those of a context in
    their order, contexts and questions in theirs.

    rows: input_ids (int32 [n]) and, where the tokenizer makes them, token_type_ids (uint8 [n]).
    question, context: int64 [windows], positions in the questions and in their contexts. starts,
    ends: int32 [n] of each window: the characters of the context that an answer from, or up to,
    this token would begin and end with; `NOWHERE` of tokens that no answer begins or ends with
    (those of the question, specials, white space). targets: int64 [windows, 2], the first and the
    last token of the answer, 0 (the first special token) in a window without the whole of it; None
    of questions whose answers aren't known. cut: questions of more than max_query_length tokens.
    """

    rows: list[dict]
    question: np.ndarray
    context: np.ndarray
    starts: list[np.ndarray]
    ends: list[np.ndarray]
    targets: np.ndarray | None
    cut: list[int]

    def __len__(self) -> int:
        return len(self.rows)


def question_windows(
    tokenizer: "PreTrainedTokenizerBase",
    questions: Questions,
    *,
    max_length: int,
    stride: int,
    max_query_length: int = 64,
) -> QuestionWindows:
    """Every context in windows of up to `max_length` tokens behind the whole question, of which
    the first `max_query_length` tokens are kept, each sharing `stride` tokens with the one before.

    Of several answers in a context the first is the target. Raises ConfigError: as `windows`, and
    where the tokenizer begins no text with a special token, which stands for "no answer".
    """
    texts, cut = _cut(tokenizer, questions.questions, max_query_length)
    owners = [(i, j) for i, given in enumerate(questions.contexts) for j in range(len(given))]
    found = QuestionWindows([], *np.zeros((2, 0), np.int64), [], [], None, cut)
    of, targets, specials = [], [], {*tokenizer.all_special_ids}
    for first in range(0, len(owners), _CHUNK):
        part = owners[first : first + _CHUNK]
        contexts = [questions.contexts[i][j] for i, j in part]
        trims = [_Trim(context) for context in contexts]
        heads = [texts[i] for i, _ in part]
        options = {"max_length": max_length, "stride": stride}
        for window in windows(tokenizer, heads, contexts, **options):
            if window.input_ids[0] not in specials:
                raise ConfigError(
                    f"{type(tokenizer).__name__} begins a text without a special token, where this "
                    "task has its score of no answer: use another model"
                )
            i, j = part[window.example]
            starts, ends = trims[window.example](window)
            of.append((i, j))
            found.rows.append(_row(window))
            found.starts.append(starts)
            found.ends.append(ends)
            if questions.answers is not None:
                answers = [a for a in questions.answers[i] if a.context == j]
                targets.append(_target(starts, ends, answers[0]) if answers else (0, 0))
    found.question, found.context = np.array(of, np.int64).reshape(-1, 2).T
    if questions.answers is not None:
        found.targets = np.array(targets, np.int64).reshape(-1, 2)
    return found


def _row(window: Window) -> dict:
    row = {"input_ids": np.array(window.input_ids, np.int32)}
    if window.token_type_ids is not None:
        row["token_type_ids"] = np.array(window.token_type_ids, np.uint8)
    return row


def _cut(tokenizer, texts: list[str], limit: int) -> tuple[list[str], list[int]]:
    """The texts, cut to their first `limit` tokens; and which were."""
    if limit < 1:
        raise ConfigError(f"max_query_length is {limit}, expected 1 or more tokens")
    if not tokenizer.is_fast:
        return texts, []  # `windows` says what is wrong
    split = lambda texts: tokenizer(
        texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    long = [i for i, ids in enumerate(split(texts)["input_ids"]) if len(ids) > limit]
    texts = list(texts)
    for i in long:
        keep, whole = limit, split([texts[i]])["offset_mapping"][0]
        cut = texts[i]
        while keep and len(split([cut])["input_ids"][0]) > limit:  # a cut word may split otherwise
            cut = texts[i][: whole[keep - 1][1]]
            keep -= 1
        texts[i] = cut
    return texts, long


class _Trim:
    """Where a context's tokens begin and end without the white space that some tokenizers count
    in."""

    def __init__(self, context: str):
        codes = np.frombuffer(context.encode("utf-32-le"), np.uint32)
        blank, places = np.isin(codes, _SPACES), np.arange(len(codes))
        after = np.where(blank, len(codes), places)[::-1]
        self.next = np.append(np.minimum.accumulate(after)[::-1], len(codes))
        before = np.where(blank, 0, places + 1)
        self.last = np.append(0, np.maximum.accumulate(before))

    def __call__(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
        begin = np.where(window.inside, window.offsets[:, 0], 0)
        end = np.where(window.inside, window.offsets[:, 1], 0)
        begin, end = self.next[begin], self.last[end]
        solid = window.inside & (begin < end)
        return tuple(np.where(solid, v, NOWHERE).astype(np.int32) for v in (begin, end))


def _target(starts, ends, answer) -> tuple[int, int]:
    """The answer's first and last token, or (0, 0) where the window lacks a part of it."""
    tokens = np.flatnonzero(starts != NOWHERE)
    text = answer.text
    begin = answer.start + len(text) - len(text.lstrip())
    end = answer.start + len(text.rstrip())
    if not len(tokens) or starts[tokens[0]] > begin or ends[tokens[-1]] < end:
        return 0, 0
    # By the characters that a token holds: of one in several byte tokens all are taken.
    first = np.searchsorted(ends[tokens], begin, side="right")
    last = np.searchsorted(starts[tokens], end, side="left") - 1
    return (int(tokens[first]), int(tokens[last])) if first <= last else (0, 0)
