"""Rows of a tensor by index, of any dtype, moved as integers of its size."""

import torch
import triton.language as tl

from .jit import cdiv, jit, power_of_2
from .spec import Spec

_UNITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WARPS, _VALUES = 4, 2048  # values per program: 32 bytes a thread in bf16


@jit
def _move_rows(x, indices, out, rows, n, SCATTER: tl.constexpr, R: tl.constexpr, N: tl.constexpr):
    """out[i] = x[indices[i]], or out[indices[i]] = x[i] if SCATTER; rows of n values."""
    i = tl.program_id(0) * R + tl.arange(0, R)
    j = tl.program_id(1) * N + tl.arange(0, N)
    near = i.to(tl.int64)[:, None] * n + j[None, :]
    far = tl.load(indices + i, i < rows, other=0)[:, None] * n + j[None, :]
    mask = (i < rows)[:, None] & (j < n)[None, :]
    if SCATTER:
        tl.store(out + far, tl.load(x + near, mask), mask)
    else:
        tl.store(out + near, tl.load(x + far, mask), mask)


def _tile(n):
    columns = min(power_of_2(n), 1024)
    return min(_VALUES // columns, 512), columns


def _move(x, indices, out, scatter):
    rows, n = indices.shape[0], x[:1].numel()
    if rows and n:
        unit = _UNITS[x.element_size()]
        R, N = _tile(n)
        grid = cdiv(rows, R), cdiv(n, N)
        _move_rows[grid](
            *(x.contiguous().view(unit), indices.contiguous(), out.view(unit), rows, n),
            *(scatter, R, N),
            num_warps=_WARPS,
        )
    return out


def gather_rows(x, indices):
    out = torch.empty((indices.shape[0], *x.shape[1:]), dtype=x.dtype, device=x.device)
    return _move(x, indices, out, False)


def scatter_rows(x, indices, rows):
    out = torch.empty((rows, *x.shape[1:]), dtype=x.dtype, device=x.device).zero_()
    return _move(x, indices, out, True)


def shipped():
    for unit in ("*i8", "*i16", "*i32", "*i64"):
        for scatter in (False, True):
            for n in (1, 768):
                R, N = _tile(n)
                types = {"x": unit, "indices": "*i64", "out": unit, "rows": "i32", "n": "i32"}
                yield Spec(_move_rows, types, {"SCATTER": scatter, "R": R, "N": N}, _WARPS)
