"""Token shards to training sequences: cut or paired, shuffled, packed to a budget of tokens.

A window is a few shards held in memory. Its sequences, their order, pairs and masks follow from
(seed, pass, window) alone, so a run resumes anywhere at once, and neither ranks nor accumulation
change what an optimizer step sees.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from .dedup import mix
from .errors import EmptyDataError
from .masking import Lexicon, Vocabulary, mask
from .shards import Shards

WINDOW_TOKENS = 16_000_000  # tokens of shards in memory at a time
_NAMES = {"train": "training", "valid": "validation"}
_SHORT = 0.1  # share of sentence pairs made shorter than the limit (Devlin et al.)


class Window(NamedTuple):
    """Sequences [CLS] A [SEP] or [CLS] A [SEP] B [SEP] as ranges of `tokens`."""

    tokens: np.ndarray
    first: np.ndarray  # int64 [sequences, 2]: A's start and end in tokens
    second: np.ndarray  # the same of B; empty ranges where there is none
    random_next: np.ndarray  # bool [sequences]: B does not follow A
    keys: np.ndarray  # uint64 [sequences]
    pairs: bool

    def lengths(self) -> np.ndarray:
        return np.diff(self.first)[:, 0] + np.diff(self.second)[:, 0] + (3 if self.pairs else 2)


class Batch(NamedTuple):
    """Packed sequences, as `BertModel.encode_packed` takes them; NumPy arrays."""

    input_ids: np.ndarray  # int64 [tokens], masked
    position_ids: np.ndarray  # int64 [tokens]
    token_type_ids: np.ndarray  # int64 [tokens]
    cu_seqlens: np.ndarray  # int32 [sequences + 1]
    max_seqlen: int
    positions: np.ndarray  # int64 [targets]: the masked tokens
    labels: np.ndarray  # int64 [targets]: what they were
    next_sentence: np.ndarray | None  # int64 [sequences]: 0 where B follows A, 1 where not


class Sequences:
    """The sequences of a prepared folder's part.

    Args:
        length: the longest sequence, specials included.
        pairs: sentence pairs for next-sentence prediction; otherwise runs of one document's text.
        kind, share, lexicon: see `masking.mask`.
    """

    def __init__(
        self,
        shards: Shards,
        words: Vocabulary,
        *,
        length: int = 128,
        pairs: bool = False,
        kind: str = "token",
        share: float = 0.15,
        lexicon: Lexicon | None = None,
        seed: int = 0,
        window_tokens: int = WINDOW_TOKENS,
    ) -> None:
        if length < 8:
            raise ValueError(f"length is {length}, expected 8 tokens or more")
        self.shards, self.words = shards, words
        self.length, self.pairs, self.seed = length, pairs, seed
        self.kind, self.share, self.lexicon = kind, share, lexicon
        if not len(shards):
            raise EmptyDataError(f"{shards.folder} has no {_NAMES[shards.part]} part")
        self.per_window = max(1, window_tokens * len(shards) // max(shards.tokens, 1))
        self.windows = -(-len(shards) // self.per_window)  # in a pass
        self._last = None  # the window made last, and its number

    def window(self, number: int) -> Window:
        """Window `number` since the start of training; passes follow one another."""
        if self._last is None or self._last[0] != number:
            self._last = number, self._window(*divmod(number, self.windows))
        return self._last[1]

    def _window(self, epoch: int, i: int) -> Window:
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.shards))
        chosen = order[i * self.per_window : (i + 1) * self.per_window]
        rng = np.random.default_rng([self.seed, epoch, i])
        tokens, sentences, documents = _joined([self.shards.load(j) for j in chosen])
        if self.pairs:
            found = _pairs(sentences, documents, self.length - 3, rng)
        else:
            found = _runs(sentences[documents], self.length - 2)
        order = rng.permutation(len(found[0]))
        first, second, random_next = (x[order] for x in found)
        base = mix(np.array([rng.integers(2**63)], np.uint64))
        keys = mix(base + np.arange(len(first), dtype=np.uint64))
        return Window(tokens, first, second, random_next, keys, self.pairs)

    def steps(self, window: Window, tokens: int, parts: int = 1) -> list[np.ndarray]:
        """Sequences of each optimizer step, up to `tokens` together, cut into `parts` alike.

        Parts of a step follow one another. What fills no whole step at the window's end is left
        out (in another pass the order is another), unless it is all there is.
        """
        total = np.concatenate([[0], np.cumsum(window.lengths())])
        if self.length > tokens:
            raise ValueError(f"a step of {tokens} tokens can't hold a sequence of {self.length}")
        out, start = [], 0
        while start < len(total) - 1:
            end = int(np.searchsorted(total, total[start] + tokens, side="right")) - 1
            if end == len(total) - 1 and out and total[end] - total[start] < tokens - self.length:
                break
            share = total[start] + (total[end] - total[start]) * np.arange(parts + 1) // parts
            cuts = np.searchsorted(total[start : end + 1], share) + start
            out += [np.arange(a, b) for a, b in pairwise(cuts)]
            start = end
        return out

    def build(self, window: Window, chosen: np.ndarray) -> Batch:
        """The packed, masked batch of the sequences `chosen`."""
        first, second = window.first[chosen], window.second[chosen]
        size_a, size_b = first[:, 1] - first[:, 0], second[:, 1] - second[:, 0]
        lengths = size_a + size_b + (3 if self.pairs else 2)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        ids = np.full(offsets[-1], self.words.sep, np.int64)
        special = np.ones(offsets[-1], bool)
        ids[offsets[:-1]] = self.words.cls
        types = np.zeros(offsets[-1], np.int64)
        begin_b = offsets[:-1] + size_a + 2
        for source, size, target in (
            (first[:, 0], size_a, offsets[:-1] + 1),
            (second[:, 0], size_b, begin_b),
        ):
            place = _ranges(size)
            to = np.repeat(target, size) + place
            ids[to] = window.tokens[np.repeat(source, size) + place]
            special[to] = False
        if self.pairs:
            types[np.repeat(begin_b, size_b + 1) + _ranges(size_b + 1)] = 1
        seen, positions = mask(
            *(ids, offsets, special, window.keys[chosen], self.words),
            *(self.kind, self.share, self.lexicon),
        )
        return Batch(
            seen,
            np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths),
            types,
            offsets.astype(np.int32),
            int(lengths.max(initial=0)),
            positions,
            ids[positions],
            window.random_next[chosen].astype(np.int64) if self.pairs else None,
        )


def _ranges(sizes: np.ndarray) -> np.ndarray:
    """0 .. sizes[0] - 1, 0 .. sizes[1] - 1, ..."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - sizes, sizes)


def _joined(shards):
    """One shard of several: (tokens, sentence offsets, document offsets)."""
    tokens = np.concatenate([s.tokens for s in shards])
    sentences, documents = [np.zeros(1, np.int64)], [np.zeros(1, np.int64)]
    for s in shards:
        sentences.append(s.sentences[1:] + sentences[-1][-1])
        documents.append(s.documents[1:] + documents[-1][-1])
    return tokens, np.concatenate(sentences), np.concatenate(documents)


def _runs(documents: np.ndarray, limit: int):
    """Each document in as few runs of up to `limit` tokens as it takes, of about equal length."""
    size = np.diff(documents)
    count = -(-size // limit)
    part, whole = _ranges(count), np.repeat(count, count)
    start, size = np.repeat(documents[:-1], count), np.repeat(size, count)
    first = np.stack([start + size * part // whole, start + size * (part + 1) // whole], 1)
    return first, np.zeros_like(first), np.zeros(len(first), bool)


def _pairs(sentences: np.ndarray, documents: np.ndarray, limit: int, rng):
    """Sentence pairs as the BERT paper makes them (Devlin et al., arXiv:1810.04805, A.2).

    A is a run of sentences; B is what follows, or in half of the cases (and where nothing
    follows) a run of another document. Together they have up to `limit` tokens; the longer one
    loses tokens at a random end. Text that B displaced starts the next pair.
    """
    s, d = sentences.tolist(), documents.tolist()
    first, second, is_random = [], [], []
    others = len(d) - 2
    for document in range(len(d) - 1):
        i, end = d[document], d[document + 1]
        while i < end:
            target = limit if rng.random() >= _SHORT else int(rng.integers(2, limit + 1))
            j = i + 1
            while j < end and s[j] - s[i] < target:
                j += 1
            cut = i + 1 if j - i == 1 else i + int(rng.integers(1, j - i))
            a = [s[i], s[cut]]
            replaced = j - i == 1 or rng.random() < 0.5
            if replaced and others:
                other = int(rng.integers(others))
                other += other >= document
                k = int(rng.integers(d[other], d[other + 1]))
                room = max(target - (a[1] - a[0]), 1)
                stop = k + 1
                while stop < d[other + 1] and s[stop] - s[k] < room:
                    stop += 1
                b = [s[k], s[stop]]
                i = cut
            else:
                if cut == j:  # one sentence, and no other document to pair it with
                    break
                b, replaced, i = [s[cut], s[j]], False, j
            _cut_pair(a, b, limit, rng)
            first.append(a)
            second.append(b)
            is_random.append(replaced)
    if not first:
        raise EmptyDataError("too little text for sentence pairs: there is one sentence")
    return np.array(first, np.int64), np.array(second, np.int64), np.array(is_random, bool)


def _cut_pair(a: list[int], b: list[int], limit: int, rng) -> None:
    """Shorten the ranges to `limit` tokens together, token by token from the longer one."""
    sizes = [a[1] - a[0], b[1] - b[0]]
    excess = sum(sizes) - limit
    if excess <= 0:
        return
    low, high = min(sizes), max(sizes)
    from_longer = min(excess, high - low)  # until they are alike, then from both in turn
    rest = excess - from_longer
    drop = [rest // 2, rest // 2 + rest % 2]
    longer = 0 if sizes[0] > sizes[1] else 1
    drop[longer] += from_longer
    for part, n in zip((a, b), drop, strict=True):
        front = int(rng.binomial(n, 0.5))
        part[0] += front
        part[1] -= n - front
