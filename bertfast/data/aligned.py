"""Tagged words as windows of tokens that know their words, and predictions of them put together."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .errors import DataError
from .tagged import Tagged
from .text_spans import joined
from .windows import Window, windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
_CHUNK = 1024  # rows in one call of the tokenizer, which bounds its memory


@dataclass
class Aligned:
    """Windows of rows of words; the arrays are one a window.

    word: int64 [n], each token's word in its row; -1 of specials and of what belongs to no word.
    first: bool [n], the token that begins its word. best: bool [n], tokens of words that take their
    prediction, and in training their target, from this window.
    count: rows. lengths: of each in tokens, without specials. shared: (row, word) -> the earlier
    word whose token covers it. silent: (row, word) of words that the tokenizer makes nothing of.
    """

    windows: list[Window]
    count: int
    lengths: list[int] = field(default_factory=list)
    word: list[np.ndarray] = field(default_factory=list)
    first: list[np.ndarray] = field(default_factory=list)
    best: list[np.ndarray] = field(default_factory=list)
    shared: dict[tuple[int, int], int] = field(default_factory=dict)
    silent: list[tuple[int, int]] = field(default_factory=list)

    def of_rows(self) -> list[list[int]]:
        """The windows of each row."""
        out = [[] for _ in range(self.count)]
        for i, window in enumerate(self.windows):
            out[window.example].append(i)
        return out

    def targets(self, tags: list[np.ndarray], label_all: bool = False) -> list[np.ndarray]:
        """int64 [n] a window: the tag of each word at its first sub-word, or at all; else IGNORED.

        tags: int64 [words] of each row. A word that stands in several windows has a target in one.
        """
        out = []
        for i, window in enumerate(self.windows):
            chosen = self.best[i] if label_all else self.best[i] & self.first[i]
            target = np.full(len(chosen), IGNORED, np.int64)
            target[chosen] = np.asarray(tags[window.example], np.int64)[self.word[i][chosen]]
            out.append(target)
        return out

    def merged(
        self, values: list[np.ndarray], every: bool = True
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each row's tokens that belong to words, every one once, from the window that is best for
        its word: (words int64 [tokens], rising; values [tokens, ...])

        values: [n, ...] a window. every: all tokens, or each word's first.
        """
        out = []
        for mine in self.of_rows():
            chosen = [self.best[i] if every else self.best[i] & self.first[i] for i in mine]
            words = [self.word[i][c] for i, c in zip(mine, chosen, strict=True)]
            found = [values[i][c] for i, c in zip(mine, chosen, strict=True)]
            words, found = np.concatenate(words), np.concatenate(found)
            # Windows overlap: a word may stand in one before words of the one before.
            order = np.argsort(words, kind="stable")
            out.append((words[order], found[order]))
        return out


def align(
    tokenizer: "PreTrainedTokenizerBase",
    rows: Tagged,
    *,
    max_length: int,
    stride: int,
    spaced: bool | None = None,
) -> Aligned:
    """Windows of the rows' tokens.

    Args:
        max_length, stride: tokens of a window, specials included; those that neighbours share.
        spaced: whether words stand apart, with a space between, as in rows that were given as
            words; None: as the rows were given. A model reads text as it was trained.

    Raises: ConfigError (see `windows`).
    """
    spaced = rows.texts is None if spaced is None else spaced
    found = Aligned([], len(rows))
    for begin in range(0, len(rows), _CHUNK):
        part = range(begin, min(begin + _CHUNK, len(rows)))
        texts = [" ".join(rows.words[i]) if spaced else rows.text(i) for i in part]
        made = windows(tokenizer, texts, max_length=max_length, stride=stride)
        of_row = [[] for _ in part]
        for window in made:
            of_row[window.example].append(window)
            window.example += begin
        for i, mine in zip(part, of_row, strict=True):
            spans = joined(rows.words[i]) if spaced else rows.spans(i)
            _add(found, i, mine, np.array(spans, np.int64).reshape(-1, 2), stride)
    return found


def _add(found: Aligned, row: int, mine: list[Window], spans, stride: int) -> None:
    """Adds a row's windows, whose tokens are counted through the whole text."""
    words = [_words(window, spans) for window in mine]
    inside = [np.flatnonzero(window.inside) for window in mine]
    sizes = [len(place) for place in inside]
    # The tokens of a window begin `stride` before the end of those of the one before.
    starts = np.cumsum([0, *(n - stride for n in sizes[:-1])])
    total = int(starts[-1]) + sizes[-1]
    found.lengths.append(total)
    of_token = np.full(total, -1, np.int64)
    for start, place, word in zip(starts, inside, words, strict=True):
        of_token[start : start + len(place)] = word[place]
    there = np.zeros(len(spans), bool)
    there[of_token[of_token >= 0]] = True
    begins = np.append(True, of_token[1:] != of_token[:-1])[:total]
    best = _best(of_token, starts, np.array(sizes))
    for k, (window, start, place, word) in enumerate(zip(mine, starts, inside, words, strict=True)):
        first, chosen = np.zeros(len(word), bool), np.zeros(len(word), bool)
        first[place] = begins[start : start + len(place)]
        chosen[place] = best[start : start + len(place)] == k
        found.windows.append(window)
        found.word.append(word)
        found.first.append(first & (word >= 0))
        found.best.append(chosen & (word >= 0))
    for word in np.flatnonzero(~there):
        covering = _covering(mine, spans, int(word))
        if covering is None:
            found.silent.append((row, int(word)))
        else:
            found.shared[row, int(word)] = covering


def _words(window: Window, spans) -> np.ndarray:
    """The first word that each token has characters of; -1 of none. A token that is the space
    before a word is the word's first: so transformers has it of words that are given."""
    out = np.full(len(window.input_ids), -1, np.int64)
    if not len(spans):
        return out
    begin, end = window.offsets.T
    word = np.searchsorted(spans[:, 1], begin, side="right")
    inside = window.inside & (begin < end) & (word < len(spans))
    word = np.minimum(word, len(spans) - 1)
    inside &= spans[word, 0] < end
    out[inside] = word[inside]
    start = np.where(inside, spans[word, 0], -1)
    space = window.inside[:-1] & ~inside[:-1] & (end[:-1] == start[1:])
    out[:-1][space] = word[1:][space]
    return out


def _best(of_token, starts, sizes) -> np.ndarray:
    """For each token the window that its prediction is of: the one in which its word has the most
    context, on the side where it has less. Where no window holds the whole word, its tokens choose
    each for itself."""
    if len(starts) == 1:
        return np.zeros(len(of_token), np.int64)
    places = np.arange(len(of_token))
    edges = np.flatnonzero(np.diff(of_token, prepend=of_token[:1] - 1, append=of_token[-1:] - 1))
    begin = edges[np.searchsorted(edges, places, side="right") - 1]
    last = edges[np.searchsorted(edges, places, side="right")] - 1
    context = _context(begin, last, starts, sizes)
    whole = context.max(0) >= 0
    context[:, ~whole] = _context(places[~whole], places[~whole], starts, sizes)
    return context.argmax(0)


def _context(begin, last, starts, sizes) -> np.ndarray:
    """[windows, n] tokens that each window has around `begin` to `last`, on the poorer side; -1
    where it doesn't hold them. Ends of the text need no care: towards them no window has more."""
    left = begin[None] - starts[:, None]
    right = (starts + sizes)[:, None] - 1 - last[None]
    held = (left >= 0) & (right >= 0)
    return np.where(held, np.minimum(left, right), -1)


def _covering(mine: list[Window], spans, word: int) -> int | None:
    """The earlier word whose token has characters of this one."""
    start, end = spans[word]
    for window in mine:
        over = window.inside & (window.offsets[:, 0] < end) & (window.offsets[:, 1] > start)
        for i in np.flatnonzero(over):
            return int(_words(window, spans)[i])
    return None


def continued(tag: str, plain: bool = False) -> str:
    """The tag of a word that has no token but that of the word before, which has this one."""
    return f"I-{tag[2:]}" if tag[:2] == "B-" and not plain else tag


def check_shared(found: Aligned, rows: Tagged) -> None:
    """DataError where one token covers words of different entities: no tag is right for it."""
    for (row, word), earlier in found.shared.items():
        tags = rows.tags[row]
        if {*tags[earlier + 1 : word + 1]} != {continued(tags[earlier], rows.plain)}:
            text, spans = rows.text(row), rows.spans(row)
            whole = text[spans[earlier][0] : spans[word][1]]
            raise DataError(
                f"{rows.place(row)}: {whole!r} is one token to this tokenizer, with the tags "
                f"{', '.join(tags[earlier : word + 1])}: let words stand apart (--spaced), or move "
                "the border of the span that begins or ends within it"
            )


def warn_silent(found: Aligned, rows: Tagged, limit: int = 5) -> str | None:
    """What to say of words that the tokenizer makes nothing of; None where there are none."""
    if not found.silent:
        return None
    shown = [f"{rows.place(i)}, word {j + 1} {rows.words[i][j]!r}" for i, j in found.silent[:limit]]
    more = ", ..." if len(found.silent) > limit else ""
    return (
        f"{len(found.silent):,} words are nothing to the tokenizer and get the tag O: "
        f"{'; '.join(shown)}{more}"
    )
