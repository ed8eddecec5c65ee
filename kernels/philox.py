"""Dropout's random bits, see bertfast/ops/dropout.py: Philox4x32-10 (Salmon et al., SC 2011)."""

import triton
import triton.language as tl


@triton.jit
def _multiply(a, b):
    """High and low words. As one 64-bit product, which is one instruction; umulhi and * are two,
    the former at a quarter of the rate."""
    product = a.to(tl.uint64) * tl.cast(b, tl.uint64)
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def _philox(seed, offset, rows, blocks):
    """Four uint32 tiles of rows, int64, blocks, int32, and offset, int64, which broadcast."""
    value = tl.load(seed)
    key0 = value.to(tl.uint32)
    key1 = (value >> 32).to(tl.uint32)
    zero = tl.cast(rows * 0 + blocks * 0, tl.uint32)
    c0 = zero + blocks.to(tl.uint32)
    c1 = zero + rows.to(tl.uint32)
    c2 = zero + (rows >> 32).to(tl.uint32)
    c3 = zero + offset.to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0 = high1 ^ c1 ^ key0
        c2 = high0 ^ c3 ^ key1
        c1 = low1
        c3 = low0
        key0 += tl.cast(0x9E3779B9, tl.uint32)
        key1 += tl.cast(0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def offsets(seed, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The seed's offset for each word of a tile.

    It's one value, loaded as a tile because the compiler leaves a tile's load where it is: of
    arithmetic alone it thinks nothing to repeat it in every thread that reads a word.
    """
    return tl.load(seed + 1 + tl.zeros([ROWS, COLUMNS], tl.int32))


@triton.jit
def keep_words(seed, offset, rows, blocks, threshold, BITS: tl.constexpr):
    """Which values are kept, as bits: int32 of `offset`'s shape. Bit i of a word is value i from
    the block that the word starts with, in `blocks`."""
    limit = tl.cast(threshold, tl.uint32)
    words = tl.zeros(offset.shape, tl.int32)
    for i in tl.static_range(BITS // 4):
        c0, c1, c2, c3 = _philox(seed, offset, rows, blocks + i)
        words |= tl.where(c0 >= limit, 1 << (4 * i), 0)
        words |= tl.where(c1 >= limit, 2 << (4 * i), 0)
        words |= tl.where(c2 >= limit, 4 << (4 * i), 0)
        words |= tl.where(c3 >= limit, (8 << (4 * i)) if i < 7 else -(2**31), 0)
    return words


@triton.jit
def bit(words, i):
    """Bit i of each word as a bool. Tensor cores leave a thread every eighth column or row, so
    that the shift is one for many values, and the mask a constant."""
    return ((words >> (i & 7)) & (tl.full([1, 1], 1, tl.int32) << (i & 24))) != 0


@triton.jit
def keep_mask(seed, rows, blocks, threshold):
    """Which values are kept: bool [M, 4 N].

    seed: pointer to int64 (seed, offset); rows: int64 [M]; blocks: int32 [N], the columns // 4;
    threshold: as `ops.dropout.threshold` gives it. For layer norm's tiles, which have all columns
    of a row, this took 24 us where `_philox` and bits took 31 (16,384 x 768, H200).
    """
    value = tl.load(seed)
    zero = tl.zeros([rows.shape[0], blocks.shape[0]], tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(
        zero + blocks.to(tl.uint32)[None, :],
        zero + rows.to(tl.uint32)[:, None],
        zero + (rows >> 32).to(tl.uint32)[:, None],
        zero + tl.load(seed + 1).to(tl.uint32),
        value.to(tl.uint32),
        (value >> 32).to(tl.uint32),
    )
    bits = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return bits >= tl.cast(threshold, tl.uint32)
