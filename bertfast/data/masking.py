"""Masked language modelling: which tokens are hidden, and behind what; new in every pass.

Every draw is a hash of (the sequence's key, position, purpose), so a sequence is masked the same
whatever batch, rank or micro-batch it falls into. 80 / 10 / 10: Devlin et al., arXiv:1810.04805.
Spans: after Joshi et al., SpanBERT, arXiv:1907.10529. Entities: after Sun et al., ERNIE,
arXiv:1904.09223.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..files import StrPath, regular
from .dedup import mix
from .errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = ("token", "whole_word", "span", "entity")
_SPAN_START = 0.2  # a word starts a new span with this probability: lengths are geometric
_SPAN_WORDS = 10  # the longest span
_ENTITY_ODDS = 3.0  # how much sooner than a word an entity is drawn
_ROUNDS = 4  # tries to fill a sequence's share with units of several tokens
_UNIT, _FATE, _REPLACEMENT, _SPAN = range(4)  # purposes of a draw


class Vocabulary(NamedTuple):
    """What masking knows of a tokenizer."""

    size: int
    cls: int
    sep: int
    mask: int
    inner: np.ndarray  # bool [size]: a piece that goes on a word ("##ing")
    regular: np.ndarray  # int64: ids that are no special tokens


def vocabulary(tokenizer: "PreTrainedTokenizerBase") -> Vocabulary:
    """Of a transformers tokenizer of BERT's kind."""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_ids)
    return Vocabulary(
        len(tokens),
        tokenizer.cls_token_id,
        tokenizer.sep_token_id,
        tokenizer.mask_token_id,
        np.array([t.startswith("##") for t in tokens]),
        np.array([i for i in range(len(tokens)) if i not in special]),
    )


def uniform(keys: np.ndarray, positions: np.ndarray, purpose: int) -> np.ndarray:
    """Draws in [0, 1), fp64: the same for the same (key, position, purpose)."""
    place = positions.astype(np.uint64) * np.uint64(8) + np.uint64(purpose)
    return (mix(keys + mix(place)) >> np.uint64(11)) * 2.0**-53


class Lexicon:
    """Phrases to be masked as a whole: a UTF-8 file of one a line, in the tokenizer's pieces."""

    def __init__(
        self, path: StrPath, tokenizer: "PreTrainedTokenizerBase", inner: np.ndarray
    ) -> None:
        try:
            lines = regular(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise DataError(f"{path}: cannot be read as UTF-8 text: {e}") from None
        phrases = [line.strip() for line in lines if line.strip()]
        if not phrases:
            raise DataError(f"{path}: holds no phrase; expected one a line")
        ids = tokenizer(phrases, add_special_tokens=False)["input_ids"]
        self.inner, self.by_first = inner, {}
        for phrase in sorted({tuple(i) for i in ids if i}, key=len, reverse=True):
            self.by_first.setdefault(phrase[0], []).append(phrase)
        self.first = np.zeros(len(inner), bool)
        self.first[list(self.by_first)] = True

    def find(self, ids: np.ndarray) -> list[tuple[int, int]]:
        """Ranges of ids that are phrases: whole words, the longest first, none overlapping."""
        found, end = [], 0
        values = ids.tolist()
        for i in np.flatnonzero(self.first[ids]).tolist():
            if i < end:
                continue
            for phrase in self.by_first[values[i]]:
                stop = i + len(phrase)
                whole = stop >= len(values) or not self.inner[values[stop]]
                if whole and tuple(values[i:stop]) == phrase:
                    found.append((i, stop))
                    end = stop
                    break
        return found


def mask(
    ids: np.ndarray,
    offsets: np.ndarray,
    special: np.ndarray,
    keys: np.ndarray,
    words: Vocabulary,
    kind: str,
    share: float,
    lexicon: Lexicon | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Hide `share` of each sequence's tokens, one or more.

    Args:
        ids: int64 [tokens], sequences one after another; offsets: int64 [sequences + 1].
        special: bool [tokens], true at [CLS] and [SEP], which are never hidden.
        keys: uint64 [sequences], the source of all draws.
        kind: "token"; "whole_word": all pieces of a word or none; "span": runs of whole words,
            geometric lengths up to 10, with one fate for all of it; "entity": whole words, and
            whole phrases of `lexicon`, drawn about three times as readily.

    Returns: the ids a model sees int64 [tokens]; positions int64 [targets] of the hidden tokens,
    ascending. Of these 80% show [MASK], 10% any other token, 10% themselves. Units that would
    pass the share are left out, but the first drawn of a sequence always counts.
    """
    sequence = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    place = np.arange(len(ids)) - offsets[sequence]
    candidates = np.bincount(sequence[~special], minlength=len(offsets) - 1)
    budget = np.maximum(np.round(candidates * share).astype(np.int64), np.minimum(candidates, 1))
    after_special = np.concatenate([[True], special[:-1]])
    start = ~special if kind == "token" else ~special & (after_special | ~words.inner[ids])
    entity = np.zeros(len(ids), bool)
    if kind == "span":
        start = _span_starts(start, after_special, sequence, place, keys, budget)
    elif kind == "entity":
        for a, b in lexicon.find(ids):
            if not special[a:b].any() and start[a]:
                start[a + 1 : b] = False
                entity[a] = True
    first = np.flatnonzero(start)  # of each unit
    unit = (np.cumsum(start) - 1)[~special]  # of each candidate
    sizes = np.bincount(unit, minlength=len(first))
    owner = sequence[first]
    draw = uniform(keys[owner], place[first], _UNIT)
    draw = np.where(entity[first], draw / _ENTITY_ODDS, draw)
    rounds = 1 if kind == "token" else _ROUNDS
    chosen = _draw_units(np.lexsort((draw, owner)), owner, sizes, budget, rounds)
    positions = np.flatnonzero(~special)[chosen[unit]]

    fate_place = place
    if kind == "span":
        fate_place = np.zeros_like(place)
        fate_place[~special] = place[first][unit]
    fate = uniform(keys[sequence[positions]], fate_place[positions], _FATE)
    other = uniform(keys[sequence[positions]], place[positions], _REPLACEMENT)
    random = words.regular[(other * len(words.regular)).astype(np.int64)]
    seen = ids.copy()
    seen[positions] = np.where(fate < 0.8, words.mask, np.where(fate < 0.9, random, ids[positions]))
    return seen, positions


def _span_starts(word, after_special, sequence, place, keys, budget):
    """Word starts that start a span too; no span has more words than half the budget."""
    fresh = word & (after_special | (uniform(keys[sequence], place, _SPAN) < _SPAN_START))
    at = np.flatnonzero(word)
    index = np.arange(len(at))
    run = index - np.maximum.accumulate(np.where(fresh[at], index, 0))
    longest = np.clip(budget // 2, 1, _SPAN_WORDS)[sequence[at]]
    out = np.zeros_like(word)
    out[at] = run % longest == 0
    return out


def _draw_units(order, owner, sizes, budget, rounds) -> np.ndarray:
    """bool [units]: taken in order, sequence by sequence, while they fit into its budget.

    Each round leaves out the first unit of a sequence that does not fit, so that smaller ones
    after it may.
    """
    owner, sizes = owner[order], sizes[order]
    head = np.concatenate([[True], owner[1:] != owner[:-1]])[: len(owner)]
    active = np.ones(len(owner), bool)
    for _ in range(rounds):
        total = np.cumsum(sizes * active)
        before = np.maximum.accumulate(np.where(head, total - sizes, 0))
        fits = active & (head | (total - before <= budget[owner]))
        over = np.flatnonzero(active & ~fits)
        if not len(over):
            break
        active[over[np.concatenate([[True], owner[over][1:] != owner[over][:-1]])]] = False
    out = np.zeros(len(order), bool)
    out[order] = fits if len(order) else out
    return out
