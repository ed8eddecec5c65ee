"""LN(residual + dropout(x + x_bias)), RMS norm or none in LN's place: each value is read once and
written once.

Bytes per value in bf16: forward 6 (x, residual, y); backward 10 (grad, x, residual, dx, ds), less
2 without dropout, where dx and ds are one. Programs of backward take every tile'th rows in turn,
keep their share of the column sums in registers and write it once.
"""

import torch
import triton
import triton.language as tl

from bertfast.ops.add_layer_norm import statistics_of, two_gradients
from bertfast.ops.dropout import threshold

from .jit import cdiv, jit
from .philox import keep_mask
from .rows import (
    as_int32,
    centre,
    gradient,
    load_columns,
    load_once,
    programs,
    statistics,
    sum_partials,
    tile,
)
from .spec import Spec

# `rows.tile`'s rows and warps; of backward also programs on a processor, as many as its registers
# let run at once, and the stages of its loop. benchmarks/gpu_tune_norm.py times others.
_FORWARD, _BACKWARD = (1, 1), (2, 4, 4, 1)


@triton.jit
def _sum(
    x, residual, k, seed, rows, j, at, mask, scale, threshold, BLOCK: tl.constexpr,
):  # fmt: skip
    """s = residual + dropout(x + k) and the dropout's mask."""
    s = load_once(x + at, mask)
    keep = mask
    if k is not None:
        s = tl.where(mask, s + k[None, :], 0)
    if seed is not None:
        keep = keep_mask(seed, rows, tl.arange(0, BLOCK // 4), threshold) & mask
        s = tl.where(keep, s * scale, 0)
    if residual is not None:
        s += load_once(residual + at, mask)
    return s, keep


@jit(do_not_specialize=["tokens", "threshold"])
def _forward(
    x, residual, weight, bias, x_bias, seed, y, mean, rstd, tokens, eps, scale, threshold,
    RMS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """x, residual, y [tokens, N]; weight, bias, x_bias [N]; mean, rstd fp32 [tokens]."""
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    j = tl.arange(0, BLOCK)
    at = rows[:, None] * N + j[None, :]
    mask = (rows < tokens)[:, None] & (j < N)[None, :]
    k = None if x_bias is None else load_columns(x_bias, j, N)
    out, _ = _sum(x, residual, k, seed, rows, j, at, mask, scale, threshold, BLOCK)
    if weight is not None:
        m, r, centred = statistics(out, mask, eps, N, RMS)
        tl.store(mean + rows, m, rows < tokens)
        tl.store(rstd + rows, r, rows < tokens)
        out = centred * r[:, None] * load_columns(weight, j, N)[None, :]
    if bias is not None:
        out += load_columns(bias, j, N)[None, :]
    tl.store(y + at, out.to(y.dtype.element_ty), mask)


@jit(do_not_specialize=["tokens", "threshold"])
def _backward(
    grad, x, residual, weight, x_bias, seed, mean, rstd, dx, ds, partial, tokens, scale, threshold,
    RMS: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr, SUMS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """partial fp32 [programs, SUMS, N]: with weight dweight and dbias, with x_bias dx_bias."""
    j = tl.arange(0, BLOCK)
    if weight is not None:
        w = load_columns(weight, j, N)
    k = None if x_bias is None else load_columns(x_bias, j, N)
    dw = tl.zeros([BLOCK], tl.float32)
    db = tl.zeros([BLOCK], tl.float32)
    dk = tl.zeros([BLOCK], tl.float32)
    tiles = tl.cdiv(tokens, R)
    for t in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        rows = t * R + tl.arange(0, R).to(tl.int64)
        at = rows[:, None] * N + j[None, :]
        mask = (rows < tokens)[:, None] & (j < N)[None, :]
        d = load_once(grad + at, mask)
        if weight is None:
            keep = mask
            if seed is not None:
                keep = keep_mask(seed, rows, tl.arange(0, BLOCK // 4), threshold)
        else:
            s, keep = _sum(x, residual, k, seed, rows, j, at, mask, scale, threshold, BLOCK)
            r = tl.load(rstd + rows, rows < tokens, other=0)
            if not RMS:
                s = centre(s, tl.load(mean + rows, rows < tokens, other=0), mask, N)
            normed = s * r[:, None]
            dw += tl.sum(d * normed, 0)
            db += tl.sum(d, 0)
            d = gradient(d * w[None, :], normed, r, N, RMS)
        if ds is not None:
            tl.store(ds + at, d.to(ds.dtype.element_ty), mask)
        if seed is not None:
            d = tl.where(keep, d * scale, 0)
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask)
        if x_bias is not None:
            dk += tl.sum(d, 0)
    partial += tl.program_id(0) * SUMS * N + j
    if weight is not None:
        tl.store(partial, dw, j < N)
        tl.store(partial + N, db, j < N)
        partial += 2 * N
    if x_bias is not None:
        tl.store(partial, dk, j < N)


def _dense(*tensors):
    return [None if t is None else t.contiguous() for t in tensors]


def add_layer_norm(x, residual, weight, bias, eps, x_bias, dropout_p, seed, rms):
    tokens, hidden = x.shape
    y = torch.empty((tokens, hidden), dtype=x.dtype, device=x.device)
    mean, rstd = statistics_of(x, weight)
    if tokens:
        block, rows, warps = tile(hidden, _FORWARD)
        _forward[cdiv(tokens, rows),](
            *_dense(x, residual, weight, bias, x_bias, seed),
            *(y, mean, rstd, tokens, eps, 1 / (1 - dropout_p), as_int32(threshold(dropout_p))),
            *(rms, hidden, block, rows),
            num_warps=warps,
        )
    return y, mean, rstd


def add_layer_norm_backward(grad, x, residual, weight, mean, rstd, x_bias, dropout_p, seed, rms):
    tokens, hidden = x.shape
    block, rows, warps = tile(hidden, _BACKWARD)
    grid = max(1, min(programs(x.device, _BACKWARD[2]), cdiv(tokens, rows)))

    def empty(*shape, dtype=x.dtype):
        return torch.empty(shape, dtype=dtype, device=x.device)

    dx = empty(tokens, hidden)
    ds = empty(tokens, hidden) if two_gradients(residual, seed) else None
    vectors = [
        None if p is None else empty(hidden, dtype=p.dtype) for p in (weight, weight, x_bias)
    ]
    sums = [v for v in vectors if v is not None]
    partial = empty(grid, len(sums), hidden, dtype=torch.float32)
    _backward[grid,](
        *_dense(grad, x, residual, weight, x_bias, seed, mean, rstd),
        *(dx, ds, partial, tokens, 1 / (1 - dropout_p), as_int32(threshold(dropout_p))),
        *(rms, hidden, block, rows, len(sums), _BACKWARD[3]),
        num_warps=warps,
    )
    if sums:
        sum_partials(partial, *sums)
    return dx, *(empty(0) if t is None else t for t in (ds, *vectors))


def shipped():
    """bf16 beside fp32 parameters (training) and all in one dtype; with and without the rest."""
    for hidden in (128, 384, 768, 1024, 4096):
        for x, p in (
            ("*bf16", "*fp32"),
            ("*bf16", "*bf16"),
            ("*fp16", "*fp16"),
            ("*fp32", "*fp32"),
        ):
            for extras in ("residual x_bias seed", "residual x_bias", "residual", ""):
                if hidden != 768 and (p != "*fp32" or x != "*bf16" or "seed" not in extras):
                    continue
                yield from _specs(hidden, x, p, ["weight", "bias", *extras.split()])
    for x in ("*bf16", "*fp32"):
        for extras in ("weight", "weight seed", "x_bias seed", "x_bias", ""):
            yield from _specs(768, x, x, ["residual", *extras.split()], "weight" in extras)


def _specs(hidden, x, parameter, extras, rms=False):
    vectors = dict.fromkeys(("weight", "bias", "x_bias"), parameter)
    optional = vectors | {"residual": x, "seed": "*i64"}
    types = {k: v for k, v in optional.items() if k in extras and k != "bias"}
    nothing = {k: None for k in optional if k not in extras and k != "bias"} | {"RMS": rms}
    types |= {"x": x, "tokens": "i32", "scale": "fp32", "threshold": "i32"}
    statistics = {"mean": "*fp32", "rstd": "*fp32"}
    block, rows, warps = tile(hidden, _FORWARD)
    constants = nothing | {"N": hidden, "BLOCK": block, "R": rows}
    own = types | statistics | {"y": x, "eps": "fp32"}
    if "bias" in extras:
        own["bias"] = parameter
    else:
        constants["bias"] = None
    yield Spec(_forward, own, constants, warps)
    block, rows, warps = tile(hidden, _BACKWARD)
    constants = nothing | {"N": hidden, "BLOCK": block, "R": rows}
    constants |= {"SUMS": 2 * ("weight" in extras) + ("x_bias" in extras), "STAGES": _BACKWARD[3]}
    types |= {"grad": x, "dx": x, "partial": "*fp32"}
    if "weight" in extras:
        types |= statistics
    else:
        constants |= dict.fromkeys(statistics)
    if "seed" in extras:
        types["ds"] = x
    else:
        constants["ds"] = None
    yield Spec(_backward, types, constants, warps)
