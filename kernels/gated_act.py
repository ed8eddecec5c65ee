"""dropout(activation(up) * gate) and its backward: each value is read once and written once."""

import torch
import triton
import triton.language as tl

from bertfast.ops.attention import dense_last
from bertfast.ops.dropout import threshold

from .jit import cdiv, jit, power_of_2
from .linear_act_kernels import activate, derivative
from .philox import keep_mask
from .rows import as_int32, load_once
from .spec import Spec

_WARPS, _VALUES = 4, 1024  # values per program: 16 bytes of bf16 a thread; others are unmeasured


@triton.jit
def _tile(tokens, n, R: tl.constexpr, BLOCK: tl.constexpr):
    """A program's rows [R, 1], columns [1, BLOCK], and what of them there is."""
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return rows[:, None], j[None, :], (rows < tokens)[:, None] & (j < n)[None, :]


@triton.jit
def _dropped(v, seed, scale, threshold, R: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    blocks = tl.program_id(1) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    return tl.where(keep_mask(seed, rows, blocks, threshold), v * scale, 0)


@jit(do_not_specialize=["tokens", "threshold"])
def _forward(
    up, gate, seed, y, up_row, gate_row, tokens, n, scale, threshold,
    ACT: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """up, gate, y [tokens, n]; rows of what is read are so many elements apart."""
    EXACT: tl.constexpr = y.dtype.element_ty == tl.float32
    rows, j, mask = _tile(tokens, n, R, BLOCK)
    v = activate(load_once(up + rows * up_row + j, mask), ACT, EXACT)
    v *= load_once(gate + rows * gate_row + j, mask)
    if seed is not None:
        v = _dropped(v, seed, scale, threshold, R, BLOCK)
    tl.store(y + rows * n + j, v.to(y.dtype.element_ty), mask)


@jit(do_not_specialize=["tokens", "threshold"])
def _backward(
    grad, up, gate, seed, dup, dgate, grad_row, up_row, gate_row, tokens, n, scale, threshold,
    ACT: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `_forward`; grad's rows are grad_row apart."""
    EXACT: tl.constexpr = dup.dtype.element_ty == tl.float32
    rows, j, mask = _tile(tokens, n, R, BLOCK)
    d = load_once(grad + rows * grad_row + j, mask)
    if seed is not None:
        d = _dropped(d, seed, scale, threshold, R, BLOCK)
    z = load_once(up + rows * up_row + j, mask)
    at = rows * n + j
    g = d * load_once(gate + rows * gate_row + j, mask)
    tl.store(dup + at, (g * derivative(z, ACT, EXACT)).to(dup.dtype.element_ty), mask)
    tl.store(dgate + at, (d * activate(z, ACT, EXACT)).to(dgate.dtype.element_ty), mask)


def _shape(n):
    block = min(max(16, power_of_2(n)), 1024)
    return _VALUES // block, block


def _launch(kernel, read, written, activation, dropout_p, seed):
    read = [dense_last(t) for t in read]
    tokens, n = written[0].shape
    if tokens and n:
        rows, block = _shape(n)
        kernel[cdiv(tokens, rows), cdiv(n, block)](
            *(*read, seed if seed is None else seed.contiguous(), *written),
            *(*(t.stride(0) for t in read), tokens, n),
            *(1 / (1 - dropout_p), as_int32(threshold(dropout_p)), activation, rows, block),
            num_warps=_WARPS,
        )


def gated_act(up, gate, activation, dropout_p, seed):
    y = torch.empty(up.shape, dtype=up.dtype, device=up.device)
    _launch(_forward, (up, gate), (y,), activation, dropout_p, seed)
    return y


def gated_act_backward(grad, up, gate, activation, dropout_p, seed):
    dup, dgate = (torch.empty(up.shape, dtype=up.dtype, device=up.device) for _ in range(2))
    _launch(_backward, (grad, up, gate), (dup, dgate), activation, dropout_p, seed)
    return dup, dgate


def shipped():
    """ModernBERT's inner size; and one that fills no tile."""
    for activation in (0, 1, 2, 3, 4):
        yield from _specs("*bf16", activation, 1152, {"seed": "*i64"})
        yield from _specs("*bf16", activation, 1152, {})
    for x in ("*fp16", "*fp32"):
        for activation in (1, 4):
            yield from _specs(x, activation, 1152, {"seed": "*i64"})
    yield from _specs("*bf16", 1, 100, {"seed": "*i64"})


def _specs(x, activation, n, seed):
    rows, block = _shape(n)
    constants = {"ACT": activation, "R": rows, "BLOCK": block} | ({} if seed else {"seed": None})
    numbers = ("up_row", "gate_row", "tokens", "n", "threshold")
    types = seed | {"up": x, "gate": x, "scale": "fp32"} | dict.fromkeys(numbers, "i32")
    yield Spec(_forward, types | {"y": x}, constants, _WARPS)
    more = {"grad": x, "dup": x, "dgate": x, "grad_row": "i32"}
    yield Spec(_backward, types | more, constants, _WARPS)
