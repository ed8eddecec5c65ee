"""The words of raw texts, and which tokens of a model's input are of each."""

import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import regex

from ..data.clean import DROP, clean_text
from ..data.errors import ConfigError
from ..data.text_spans import split_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1024  # texts in one call of the tokenizer, which bounds its memory
_CLUSTER = regex.compile(r"\X")


class Text(NamedTuple):
    """A text (or pair) as the model reads it."""

    row: dict  # input_ids and perhaps token_type_ids, as of `data.encode`
    spans: list[tuple[int, int, int]]  # of each word: 0 or 1 (text, pair), characters of the raw
    word: np.ndarray  # int64 [tokens]: each one's word; -1 of specials and what is of no word

    def total(self, scores: np.ndarray) -> np.ndarray:
        """Scores of tokens [tokens] as sums of words, fp64 [words]; NaN without a token."""
        inside, count = self.word >= 0, len(self.spans)
        found = np.bincount(self.word[inside], scores[inside], count)
        return np.where(self.read(), found, np.nan)

    def read(self) -> np.ndarray:
        """bool [words]: whether the model reads it; not behind the cut, nor what is no token."""
        return np.isin(np.arange(len(self.spans)), self.word)


def read(
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    max_length: int,
) -> list[Text]:
    """Raw texts (and pairs, or None) cleaned and encoded as `predict` does, with their words.

    Words are `data.text_spans.split_words`'s; those that one token covers count as one.
    Raises ConfigError where the tokenizer can't say where its tokens stand.
    """
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{type(tokenizer).__name__} can't say where in a text its tokens stand: use a model "
            "with a fast tokenizer (tokenizer.json)"
        )
    found = []
    for start in range(0, len(texts), _CHUNK):
        sides = [s[start : start + _CHUNK] for s in (texts, pairs) if s is not None]
        sides = [[cleaned(text) for text in side] for side in sides]
        out = tokenizer(
            *([text for text, _ in side] for side in sides),
            truncation=True,
            max_length=max_length,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        for i, one in enumerate(zip(*sides, strict=True)):
            fields = [k for k in ("input_ids", "token_type_ids") if k in out]
            offsets = np.array(out["offset_mapping"][i], np.int64).reshape(-1, 2)
            of = np.array([-1 if s is None else s for s in out.sequence_ids(i)], np.int64)
            found.append(_text({k: out[k][i] for k in fields}, one, of, offsets))
    return found


def _text(row, sides, of, offsets) -> Text:
    """of: int64 [tokens], the side of each token, -1 of specials."""
    spans, word = [], np.full(len(of), -1, np.int64)
    for side, (text, places) in enumerate(sides):
        here = of == side
        own, ids = _words(np.array(split_words(text), np.int64).reshape(-1, 2), offsets[here])
        word[here] = np.where(ids < 0, -1, ids + len(spans))
        spans += [(side, int(places[a, 0]), int(places[b - 1, 1])) for a, b in own]
    return Text(row, spans, word)


def _words(spans, offsets):
    """(words as spans [words, 2], each token's word): those that share a token put together."""
    begin, end = offsets.T
    first = np.searchsorted(spans[:, 1], begin, side="right")
    last = np.searchsorted(spans[:, 0], end, side="left") - 1
    real = (begin < end) & (first <= last)  # not what is a space, or nothing
    goes_on = np.zeros(len(spans), bool)
    for a, b in zip(first[real], last[real], strict=True):
        goes_on[a + 1 : b + 1] = True
    ids = np.full(len(offsets), -1, np.int64)
    ids[real] = (np.cumsum(~goes_on) - 1)[first[real]]
    ends = np.append(~goes_on[1:], True)[: len(spans)]
    return np.stack([spans[~goes_on, 0], spans[ends, 1]], 1), ids


def cleaned(raw: str) -> tuple[str, np.ndarray]:
    """(`data.clean_text` of it, int64 [characters, 2]: which of the raw each one comes from)"""
    text = clean_text(raw)
    if text == raw:
        return text, _run(0, len(raw))
    places = []
    for chunk in re.finditer(r"\S+", raw):
        own = _chunk(chunk[0], chunk.start())
        if len(own):
            places += [[[own[0, 0] - 1, own[0, 0]]], own] if places else [own]
    places = np.concatenate(places or [_run(0, 0)])
    assert len(places) == len(text), "a cleaned text is not that of its parts"
    return text, places


def _chunk(raw: str, start: int) -> np.ndarray:
    """Of a run without a space, which begins at `start`."""
    kept = [(i, c) for i, c in enumerate(raw) if not DROP.match(c)]
    rest = "".join(c for _, c in kept)
    normal, made, parts = unicodedata.normalize("NFC", rest), [], []
    for cluster in _CLUSTER.finditer(rest):
        a, b = cluster.span()
        new = unicodedata.normalize("NFC", cluster[0])
        made.append(new)
        where = [kept[i][0] for i in range(a, b)]
        if new == cluster[0]:
            parts.append(np.array([[start + i, start + i + 1] for i in where]))
        else:
            parts.append(np.array([[start + where[0], start + where[-1] + 1]] * len(new)))
    if "".join(made) != normal:  # marks that compose beyond a cluster: the run is one
        whole = [[start + kept[0][0], start + kept[-1][0] + 1]]
        return np.array(whole * len(normal), np.int64).reshape(-1, 2)
    return np.concatenate(parts or [_run(0, 0)])


def _run(start: int, end: int) -> np.ndarray:
    places = np.arange(start, end)
    return np.stack([places, places + 1], 1)
