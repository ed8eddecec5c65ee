"""Layer norm's backward in other ways than kernels/add_layer_norm.py.

A warp has whole rows of its own, several warps a program, so that no sum over a row waits for
another warp; or two warps have one, with half of the registers. The three sums over a row are one
reduction; column sums are added up over a program's warps once, at the end; the next rows are
loaded before these are worked on.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from bertfast.kernels.add_layer_norm import _dense
from bertfast.kernels.jit import cdiv, jit
from bertfast.kernels.rows import as_int32, programs, sum_partials

from bertfast.ops.dropout import threshold
from variants.record import spec_of

LANES = tl.constexpr(256)  # columns that a warp's 16-byte accesses of bf16 span


class Variant(NamedTuple):
    warps: int
    rows: int  # at a time: as many as warps, or half of that
    programs: int  # on a processor
    ahead: bool = False


@triton.jit
def _add(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def _columns(pointer, j, N: tl.constexpr):
    return tl.load(pointer + j, j < N, other=0, eviction_policy="evict_last").to(tl.float32)


@triton.jit
def _load(grad, x, residual, t, at, mask, R: tl.constexpr, N: tl.constexpr):
    """The rows of tile t in their own dtype."""
    start = tl.cast(t, tl.int64) * (R * N)
    g = tl.load(grad + start + at, mask, other=0, eviction_policy="evict_first")
    s = tl.load(x + start + at, mask, other=0, eviction_policy="evict_first")
    r = s
    if residual is not None:
        r = tl.load(residual + start + at, mask, other=0, eviction_policy="evict_first")
    return g, s, r


@triton.jit
def _keep(seed, row, j, threshold):
    """`philox.keep_mask` of [chunks, rows, LANES]."""
    value = tl.load(seed)
    block = j // 4
    zero = tl.zeros(block.shape, tl.uint32) + (row * 0).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(
        zero + block.to(tl.uint32),
        zero + row.to(tl.uint32),
        zero + (row >> 32).to(tl.uint32),
        zero + tl.load(seed + 1).to(tl.uint32),
        value.to(tl.uint32),
        (value >> 32).to(tl.uint32),
    )
    bits = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return bits >= tl.cast(threshold, tl.uint32)


@jit(do_not_specialize=["tokens", "threshold"])
def backward(
    grad, x, residual, weight, x_bias, seed, mean, rstd, dx, ds, partial, tokens, scale, threshold,
    N: tl.constexpr, C: tl.constexpr, R: tl.constexpr, SUMS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """As the shipped `_backward`; C chunks of LANES columns, R rows, of a warp or two each."""
    chunk = tl.arange(0, C)[:, None, None] * LANES
    j = chunk + tl.arange(0, LANES)[None, None, :]
    quarter = chunk + tl.arange(0, LANES // 4)[None, None, :] * 4
    r = tl.arange(0, R)
    w = _columns(weight, j, N)
    k = None if x_bias is None else _columns(x_bias, j, N)
    dw = tl.zeros([C, R, LANES], tl.float32)
    db = tl.zeros([C, R, LANES], tl.float32)
    dk = tl.zeros([C, R, LANES], tl.float32)
    at = r[None, :, None] * N + j
    tiles = tl.cdiv(tokens, R)
    t = tl.program_id(0)
    if AHEAD:
        inside = (t * R + r < tokens)[None, :, None] & (j < N)
        g_next, x_next, r_next = _load(grad, x, residual, t, at, inside, R, N)
    for t in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        rows = t * R + r
        mask = (rows < tokens)[None, :, None] & (j < N)
        if AHEAD:
            g, s, extra = g_next, x_next, r_next
            then = t + tl.num_programs(0)
            inside = (then * R + r < tokens)[None, :, None] & (j < N)
            g_next, x_next, r_next = _load(grad, x, residual, then, at, inside, R, N)
        else:
            g, s, extra = _load(grad, x, residual, t, at, mask, R, N)
        m = tl.load(mean + rows, rows < tokens, other=0)[None, :, None]
        rs = tl.load(rstd + rows, rows < tokens, other=0)[None, :, None]
        g = g.to(tl.float32)
        s = s.to(tl.float32)
        if k is not None:
            s = tl.where(mask, s + k, 0)
        if seed is not None:
            keep = _keep(seed, rows.to(tl.int64)[None, :, None], quarter, threshold) & mask
            s = tl.where(keep, s * scale, 0)
        if residual is not None:
            s += extra.to(tl.float32)
        c = tl.where(mask, s - m, 0)
        gw = g * w
        # Of s - mean what the mean's rounding left is taken off afterwards, from the sums.
        c0, g0, p0 = tl.reduce((tl.sum(c, 0), tl.sum(gw, 0), tl.sum(gw * c, 0)), 1, _add)
        left = (c0 / N)[None, :, None]
        a = (g0 / N)[None, :, None]
        normed = tl.where(mask, c - left, 0) * rs
        b = (p0[None, :, None] - left * g0[None, :, None]) / N * rs
        dw += g * normed
        db += g
        d = (gw - a - normed * b) * rs
        if ds is not None:
            tl.store(ds + rows.to(tl.int64)[None, :, None] * N + j, d.to(ds.dtype.element_ty), mask)
        if seed is not None:
            d = tl.where(keep, d * scale, 0)
        tl.store(dx + rows.to(tl.int64)[None, :, None] * N + j, d.to(dx.dtype.element_ty), mask)
        if x_bias is not None:
            dk += tl.where(mask, d, 0)
    partial += tl.program_id(0) * SUMS * N + j
    one = tl.zeros([C, 1, LANES], tl.int32) + j
    tl.store(partial, tl.sum(dw, 1)[:, None, :], one < N)
    tl.store(partial + N, tl.sum(db, 1)[:, None, :], one < N)
    if x_bias is not None:
        tl.store(partial + 2 * N, tl.sum(dk, 1)[:, None, :], one < N)


def run(grad, x, residual, weight, mean, rstd, x_bias, p, seed, variant, launch=None):
    """As `add_layer_norm_backward`: dx, ds or nothing, dweight, dbias, dx_bias or nothing."""
    tokens, hidden = x.shape
    two = residual is not None and seed is not None
    sums = 2 if x_bias is None else 3
    each = variant.programs
    grid = max(1, min(programs(x.device, each), cdiv(tokens, variant.rows)))

    def empty(*shape, dtype=x.dtype):
        return torch.empty(shape, dtype=dtype, device=x.device)

    dx, ds = empty(tokens, hidden), empty(tokens, hidden) if two else None
    partial = empty(grid, sums, hidden, dtype=torch.float32)
    tensors = _dense(grad, x, residual, weight, x_bias, seed, mean, rstd)
    chunks = 1 << (cdiv(hidden, LANES.value) - 1).bit_length()
    rest = (dx, ds, partial, tokens, 1 / (1 - p), as_int32(threshold(p)))
    arguments = (*tensors, *rest, hidden, chunks, variant.rows, sums, variant.ahead)
    (launch or _launch)(grid, variant, arguments)
    dw, db = (empty(hidden, dtype=weight.dtype) for _ in range(2))
    dx_bias = None if x_bias is None else empty(hidden, dtype=x_bias.dtype)
    if launch is None:
        sum_partials(partial, dw, db, dx_bias)
    return dx, empty(0) if ds is None else ds, dw, db, empty(0) if dx_bias is None else dx_bias


def _launch(grid, variant, arguments):
    backward[(grid,)](*arguments, num_warps=variant.warps)


CANDIDATES = [Variant(*sizes) for sizes in ((1, 1, 8), (1, 1, 9), (2, 2, 4), (4, 4, 2))]
CANDIDATES += [
    Variant(*sizes, ahead)
    for sizes in ((2, 1, 5), (2, 1, 6), (4, 2, 2), (4, 2, 3), (8, 4, 1))
    for ahead in (False, True)
]


def specs():
    for hidden in (768, 1024):
        for p in (0.0, 0.1):
            for variant in dict.fromkeys(v._replace(programs=1) for v in CANDIDATES):
                x = torch.empty(64, hidden, dtype=torch.bfloat16, device="meta")
                row, each = x[0], torch.empty(64, device="meta")
                seed = torch.empty(2, dtype=torch.int64, device="meta") if p else None
                made = []
                record = lambda *launch, made=made: made.append(launch)
                run(x, x, x, row, each, each, row, p, seed, variant, record)
                [(_, _, arguments)] = made
                named = dict(zip(backward.names, arguments, strict=True))
                what = f"backward, {hidden} wide, p={p}, {tuple(variant)}"
                yield what, spec_of(backward, named, variant.warps, 3)
