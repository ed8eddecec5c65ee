"""Equal and nearly equal documents: MinHash signatures, found by banding, checked in full.

MinHash: Broder, "On the resemblance and containment of documents", 1997. Banding: Leskovec,
Rajaraman, Ullman, "Mining of massive datasets", chapter 3.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

SHINGLE = 5  # words in a shingle
HASHES = 64  # in a signature
ROWS = 4  # hashes in a band
BANDS = HASHES // ROWS
_IN_MEMORY = 4_000_000  # hashes sorted at a time, which bounds memory


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea, Flood 2014): uint64 -> uint64, a bijection."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


_SEEDS = mix(np.arange(1, 2 * HASHES + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
_FACTORS, _TERMS = _SEEDS[:HASHES] | np.uint64(1), _SEEDS[HASHES:]


def word_hashes(table: list[str]) -> np.ndarray:
    """uint64 of each word, the same in every process and on every machine."""
    digest = lambda w: hashlib.blake2b(w.encode("utf-8", "replace"), digest_size=8).digest()
    return np.frombuffer(b"".join(map(digest, table)), "<u8")


def sequence_hashes(hashes: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """uint64 of each range of `hashes`, its order included."""
    place = np.arange(len(hashes)) - np.repeat(offsets[:-1], np.diff(offsets))
    mixed = mix(hashes + mix(place.astype(np.uint64)))
    total = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed, dtype=np.uint64)])
    return mix(total[offsets[1:]] - total[offsets[:-1]])


def signatures(hashes: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """uint32 [documents, HASHES] of documents that have a word or more each.

    The share of equal hashes of two signatures estimates the Jaccard similarity of the documents'
    sets of five-word shingles; a shorter document is one shingle.
    """
    n, lengths = len(hashes), np.diff(offsets)
    if not len(lengths):
        return np.zeros((0, HASHES), np.uint32)
    end = np.repeat(offsets[1:], lengths)
    place = np.arange(n) - np.repeat(offsets[:-1], lengths)
    starts = np.flatnonzero((np.arange(n) + SHINGLE <= end) | (place == 0))
    padded = np.concatenate([hashes, np.zeros(SHINGLE, np.uint64)])
    shingles = np.zeros(len(starts), np.uint64)
    for k in range(SHINGLE):
        inside = starts + k < end[starts]
        shingles = mix(shingles + np.where(inside, padded[starts + k], np.uint64(0)))
    first = np.searchsorted(starts, offsets[:-1])
    out = np.empty((HASHES, len(lengths)), np.uint32)
    values = np.empty_like(shingles)
    for i in range(HASHES):
        np.multiply(shingles, _FACTORS[i], out=values)
        values += _TERMS[i]
        out[i] = np.minimum.reduceat(values, first) >> np.uint64(32)
    return np.ascontiguousarray(out.T)


def bands(signature: np.ndarray) -> np.ndarray:
    """uint64 [BANDS, documents]: documents that share a band's hash are candidates."""
    pairs = signature.view(np.uint64).reshape(len(signature), BANDS, ROWS // 2)
    out = np.zeros((len(signature), BANDS), np.uint64)
    for i in range(ROWS // 2):
        out = mix(out + pairs[:, :, i])
    return np.ascontiguousarray(out.T)


def _groups(parts, wanted=None):
    """Positions with equal hashes, some millions at a time: (hashes, positions), sorted by both.

    parts: functions that load consecutive arrays of hashes.
    """
    total = sum(len(load()) for load in parts)
    passes = -(-total // _IN_MEMORY) or 1
    for p in range(passes):
        hashes, positions, start = [], [], 0
        for load in parts:
            h = load()
            here = (h % np.uint64(passes)) == p if passes > 1 else np.ones(len(h), bool)
            if wanted is not None:
                here = here & wanted[start : start + len(h)]
            hashes.append(h[here])
            positions.append(np.flatnonzero(here) + start)
            start += len(h)
        hashes, positions = np.concatenate(hashes), np.concatenate(positions)
        order = np.argsort(hashes, kind="stable")
        yield hashes[order], positions[order]


def repeats(
    parts: Iterable[np.ndarray], wanted: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(first, later) positions, int64 arrays: each later one has the hash of its first."""
    for hashes, positions in _groups(parts, wanted):
        if len(hashes):
            new = np.concatenate([[True], hashes[1:] != hashes[:-1]])
            first = positions[np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))]
            yield first[~new], positions[~new]


def frequent(
    parts: Iterable[np.ndarray], limit: int, wanted: np.ndarray | None = None
) -> np.ndarray:
    """The hashes that occur more than `limit` times, sorted."""
    out = [np.zeros(0, np.uint64)]
    for hashes, _ in _groups(parts, wanted):
        values, counts = np.unique(hashes, return_counts=True)
        out.append(values[counts > limit])
    return np.sort(np.concatenate(out))


def similarity(
    pairs: tuple[np.ndarray, np.ndarray], batches: np.ndarray, load: Callable[[int], Any]
) -> np.ndarray:
    """Estimated Jaccard similarity of documents pairs[0][i] and pairs[1][i].

    batches: offsets of each batch's first document; load(b): its signatures.
    """
    wanted = np.unique(np.concatenate(pairs))
    rows = np.empty((len(wanted), HASHES), np.uint32)
    batch = np.searchsorted(batches, wanted, side="right") - 1
    for b in np.unique(batch):
        rows[batch == b] = load(b)[wanted[batch == b] - batches[b]]
    a, b = (rows[np.searchsorted(wanted, p)] for p in pairs)
    return (a == b).mean(1)
