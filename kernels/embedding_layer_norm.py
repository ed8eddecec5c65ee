"""dropout(LN(word + position + type)) on packed ids.

Backward makes the gradient of the normalised sum in fp32, and the tables' gradients of it by
torch's embedding_dense_backward, which sorts the ids and adds up each run in order: no atomics,
the same bits every time.
"""

import torch
import triton
import triton.language as tl

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

_FORWARD, _BACKWARD = (1, 1), (1, 4, 6)  # as in add_layer_norm.py, where it doesn't spill


@triton.jit
def _rows_of(table, ids, rows, tokens, j, mask, N: tl.constexpr):
    row = tl.load(ids + rows, rows < tokens, other=0)
    return tl.load(table + row[:, None] * N + j[None, :], mask, other=0).to(tl.float32)


@triton.jit
def _sum(ids, positions, types, word, position, token_type, rows, tokens, j, mask, N: tl.constexpr):
    s = _rows_of(word, ids, rows, tokens, j, mask, N)
    s += _rows_of(position, positions, rows, tokens, j, mask, N)
    if types is not None:
        s += _rows_of(token_type, types, rows, tokens, j, mask, N)
    return s


@jit(do_not_specialize=["tokens", "threshold"])
def _forward(
    ids, positions, types, word, position, token_type, weight, bias, seed, y, mean, rstd,
    tokens, eps, scale, threshold, N: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """ids, positions, types int64 [tokens]; the tables [.., N]; y [tokens, N]."""
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    j = tl.arange(0, BLOCK)
    mask = (rows < tokens)[:, None] & (j < N)[None, :]
    s = _sum(ids, positions, types, word, position, token_type, rows, tokens, j, mask, N)
    m, r, centred = statistics(s, mask, eps, N)
    tl.store(mean + rows, m, rows < tokens)
    tl.store(rstd + rows, r, rows < tokens)
    out = centred * r[:, None] * load_columns(weight, j, N)[None, :]
    out += load_columns(bias, j, N)[None, :]
    if seed is not None:
        keep = keep_mask(seed, rows, tl.arange(0, BLOCK // 4), threshold)
        out = tl.where(keep, out * scale, 0)
    tl.store(y + rows[:, None] * N + j[None, :], out.to(y.dtype.element_ty), mask)


@jit(do_not_specialize=["tokens", "threshold"])
def _backward(
    grad, ids, positions, types, word, position, token_type, weight, seed, mean, rstd, ds, partial,
    tokens, scale, threshold, N: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """ds fp32 [tokens, N]; partial fp32 [programs, 2, N]: dweight and dbias."""
    j = tl.arange(0, BLOCK)
    w = load_columns(weight, j, N)
    dw = tl.zeros([BLOCK], tl.float32)
    db = tl.zeros([BLOCK], tl.float32)
    for t in range(tl.program_id(0), tl.cdiv(tokens, R), tl.num_programs(0)):
        rows = t * R + tl.arange(0, R).to(tl.int64)
        at = rows[:, None] * N + j[None, :]
        mask = (rows < tokens)[:, None] & (j < N)[None, :]
        g = load_once(grad + at, mask)
        if seed is not None:
            keep = keep_mask(seed, rows, tl.arange(0, BLOCK // 4), threshold)
            g = tl.where(keep, g * scale, 0)
        s = _sum(ids, positions, types, word, position, token_type, rows, tokens, j, mask, N)
        m = tl.load(mean + rows, rows < tokens, other=0)
        r = tl.load(rstd + rows, rows < tokens, other=0)
        normed = centre(s, m, mask, N) * r[:, None]
        dw += tl.sum(g * normed, 0)
        db += tl.sum(g, 0)
        tl.store(ds + at, gradient(g * w[None, :], normed, r, N), mask)
    partial += tl.program_id(0) * 2 * N + j
    tl.store(partial, dw, j < N)
    tl.store(partial + N, db, j < N)


def _dense(*tensors):
    return [None if t is None else t.contiguous() for t in tensors]


def embedding_layer_norm(
    word, ids, positions, types, position, token_type, weight, bias, eps, dropout_p, seed
):
    tokens, hidden = ids.shape[0], word.shape[1]
    y = torch.empty((tokens, hidden), dtype=word.dtype, device=word.device)
    mean, rstd = (torch.empty(tokens, dtype=torch.float32, device=word.device) for _ in range(2))
    if tokens:
        block, rows, warps = tile(hidden, _FORWARD)
        _forward[cdiv(tokens, rows),](
            *_dense(ids, positions, types, word, position, token_type, weight, bias, seed),
            *(y, mean, rstd, tokens, eps, 1 / (1 - dropout_p), as_int32(threshold(dropout_p))),
            *(hidden, block, rows),
            num_warps=warps,
        )
    return y, mean, rstd


def embedding_layer_norm_backward(
    grad, ids, positions, types, word, position, token_type, weight, mean, rstd, dropout_p, seed
):
    tokens, hidden = grad.shape
    block, rows, warps = tile(hidden, _BACKWARD)
    grid = max(1, min(programs(grad.device, _BACKWARD[2]), cdiv(tokens, rows)))
    ds = torch.empty((tokens, hidden), dtype=torch.float32, device=grad.device)
    partial = torch.empty((grid, 2, hidden), dtype=torch.float32, device=grad.device)
    _backward[grid,](
        *_dense(grad, ids, positions, types, word, position, token_type, weight, seed, mean, rstd),
        *(ds, partial, tokens, 1 / (1 - dropout_p), as_int32(threshold(dropout_p))),
        *(hidden, block, rows),
        num_warps=warps,
    )
    dw, db = (torch.empty(hidden, dtype=weight.dtype, device=grad.device) for _ in range(2))
    sum_partials(partial, dw, db)

    def scatter(table, rows):
        if table is None:
            return torch.empty(0, dtype=word.dtype, device=grad.device)
        return torch.ops.aten.embedding_dense_backward(ds, rows, table.shape[0], -1, False).to(
            table.dtype
        )

    tables = scatter(word, ids), scatter(position, positions), scatter(token_type, types)
    return *tables, dw, db


def shipped():
    for x in ("*bf16", "*fp32", "*fp16"):
        for hidden in (128, 384, 768, 1024):
            for extras in ("type seed", "type", ""):
                if hidden == 768 or (x == "*bf16" and extras == "type seed"):
                    yield from _specs(hidden, x, extras)


def _specs(hidden, x, extras):
    optional = {}
    if "type" in extras:
        optional |= {"types": "*i64", "token_type": x}
    if "seed" in extras:
        optional |= {"seed": "*i64"}
    nothing = {k: None for k in ("types", "token_type", "seed") if k not in optional}
    types = {"ids": "*i64", "positions": "*i64", "word": x, "position": x, "weight": x}
    types |= {"mean": "*fp32", "rstd": "*fp32", "tokens": "i32", "scale": "fp32"}
    types |= {"threshold": "i32", **optional}
    for kernel, values, more in (
        (_forward, _FORWARD, {"bias": x, "y": x, "eps": "fp32"}),
        (_backward, _BACKWARD, {"grad": x, "ds": "*fp32", "partial": "*fp32"}),
    ):
        block, rows, warps = tile(hidden, values)
        yield Spec(kernel, types | more, nothing | {"N": hidden, "BLOCK": block, "R": rows}, warps)
