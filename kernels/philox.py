"""Dropout's random bits, see bertfast/ops/dropout.py: Philox4x32-10 (Salmon et al., SC 2011)."""

import triton
import triton.language as tl


@triton.jit
def keep_mask(seed, rows, blocks, threshold):
    """Which values are kept: bool [M, 4 N].

    seed: pointer to int64 (seed, offset); rows: int64 [M]; blocks: int32 [N], the columns // 4;
    threshold: as `ops.dropout.threshold` gives it.
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
