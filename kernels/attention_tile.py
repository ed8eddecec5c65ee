"""What attention's kernels share: a sequence's place, tiles of rows, scores and dropout's bits."""

import math

import triton
import triton.language as tl

from .philox import bit, keep_words, offsets

_LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def place(starts, item, batch, blocks, SIZE: tl.constexpr):
    """The sequence of a work item, and which of its blocks of SIZE rows the item is.

    Each sequence has `blocks` items, or, where that is None, sequence b has those from
    starts[b] // SIZE + b up to its successor's first: as many as it can have blocks, so that
    mixed lengths need neither a list of work nor many more programs than blocks.
    """
    if blocks is None:
        found = 0
        for first in range(0, batch, 256):
            b = first + tl.arange(0, 256)
            begin = tl.load(starts + b, mask=b < batch, other=0) // SIZE + b
            found += tl.sum(((b < batch) & (begin <= item)).to(tl.int32))
        sequence = found - 1
        block = item - tl.load(starts + sequence) // SIZE - sequence
    else:
        sequence = item // blocks
        block = item % blocks
    return sequence, block


@triton.jit
def span(starts, sequence, used=None):
    """Where a sequence starts, and its length or how much of it is used."""
    start = tl.load(starts + sequence)
    length = tl.load(starts + sequence + 1) - start if used is None else tl.load(used + sequence)
    return start, length


@triton.jit
def load_rows(
    base, row, rows, TOKEN: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr,
    FULL: tl.constexpr = False,
):  # fmt: skip
    """[len(row), D] from `base`, zeros past the `rows` rows and DIM columns that there are; FULL
    where all of the rows are."""
    column = tl.arange(0, D)
    at = base + row.to(tl.int64)[:, None] * TOKEN + column[None, :]
    if FULL and DIM == D:
        return tl.load(at)
    else:
        mask = (row < rows)[:, None]
        if DIM < D:
            mask = mask & (column < DIM)[None, :]
        return tl.load(at, mask=mask, other=0.0)


@triton.jit
def store_rows(base, x, row, rows, TOKEN: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr):
    column = tl.arange(0, D)
    mask = (row < rows)[:, None]
    if DIM < D:
        mask = mask & (column < DIM)[None, :]
    at = base + row.to(tl.int64)[:, None] * TOKEN + column[None, :]
    tl.store(at, x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def square(base, row, query, key, step):
    """Pointers to a tile of [queries, keys] of row stride `step`; `row` is the tile's first, so
    that a 64-bit offset is needed once and not for every element."""
    return base + tl.cast(row, tl.int64) * step + ((query - row) * step + key)


@triton.jit
def near(first, end, row, window, ROWS: tl.constexpr, STEP: tl.constexpr):
    """Of the positions from `first` to `end`, those within the window of ROWS rows from `row`, from
    a multiple of STEP on."""
    first = tl.maximum(first, tl.maximum(row - window, 0) // STEP * STEP)
    return first, tl.minimum(end, row + ROWS + window)


@triton.jit
def scores(
    product, row, query, key, queries, keys, bias, bias_query, scale, window, CAUSAL: tl.constexpr
):
    """A tile of q k^T -> its scores in base 2, -inf where masked.

    query [M, 1] from `row` and key [1, N], or [1, M] and [N, 1] for the transposed tile.
    """
    s = product * (scale * _LOG2E) + tl.where(key < keys, 0.0, float("-inf"))
    if bias is not None:
        inside = (query < queries) & (key < keys)
        at = square(bias, row, query, key, bias_query)
        s += tl.load(at, mask=inside, other=0.0).to(tl.float32) * _LOG2E
    if CAUSAL:
        s = tl.where(key <= query, s, float("-inf"))
    if window is not None:
        s = tl.where(tl.abs(query - key) <= window, s, float("-inf"))
    return s


@triton.constexpr_function
def word_bits(m, n):
    """Keys a word of dropout's bits, so that there are words for 256 threads."""
    return min(32, n, max(4, m * n // 256))


@triton.jit
def words_offset(seed, M: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr = False):
    """What `kept` needs of the seed beside it, to be loaded before a loop."""
    BITS: tl.constexpr = word_bits(M, N)
    if TRANSPOSED:
        return offsets(seed, N // BITS, M)
    else:
        return offsets(seed, M, N // BITS)


@triton.jit
def kept(
    seed, offset, token, head, key, threshold,
    HEADS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr = False,
):  # fmt: skip
    """Dropout's mask [M, N] of the rows from `token` and the keys from `key`, a multiple of 4;
    or transposed.

    The random bits come four keys at a time and a thread of the score tile has two of them. So
    each thread makes a word of up to 32 keys' bits, and it's the words that change place. Callers
    ask for them before the tile's products, when registers are free.
    """
    BITS: tl.constexpr = word_bits(M, N)
    row = (token + tl.arange(0, M)).to(tl.int64) * HEADS + head
    block = key // 4 + tl.arange(0, N // BITS) * (BITS // 4)
    column = tl.arange(0, N) & (BITS - 1)
    if TRANSPOSED:
        words = keep_words(seed, offset, row[None, :], block[:, None], threshold, BITS)
        words = tl.broadcast_to(words[:, None, :], [N // BITS, BITS, M])
        return bit(tl.reshape(words, [N, M]), column[:, None])
    else:
        words = keep_words(seed, offset, row[:, None], block[None, :], threshold, BITS)
        words = tl.broadcast_to(words[:, :, None], [M, N // BITS, BITS])
        return bit(tl.reshape(words, [M, N]), column[None, :])
