"""Queries and keys turned by their positions' angles, values copied."""

import torch
import triton.language as tl

from .jit import cdiv, jit, power_of_2
from .spec import Spec

_WARPS, _PAIRS = 4, 1024  # pairs of values per program; which are quickest is unmeasured


@jit(do_not_specialize=["tokens"])
def _turn(
    qkv, angles, out, tokens, INVERSE: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """qkv, out [tokens, 3, HEADS, DIM]; angles fp32 [tokens, 2, DIM / 2]. R heads of any tokens."""
    half: tl.constexpr = DIM // 2
    heads = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    token = heads // (3 * HEADS)
    turned = ((heads // HEADS) % 3 < 2)[:, None]
    j = tl.arange(0, BLOCK)
    mask = (token < tokens)[:, None] & (j < half)[None, :]
    at = heads[:, None] * DIM + j[None, :]
    angle = angles + token[:, None] * DIM + j[None, :]
    a = tl.load(qkv + at, mask).to(tl.float32)
    b = tl.load(qkv + at + half, mask).to(tl.float32)
    cos = tl.load(angle, mask & turned)
    sin = tl.load(angle + half, mask & turned)
    if INVERSE:
        sin = -sin
    first = tl.where(turned, a * cos - b * sin, a)
    second = tl.where(turned, b * cos + a * sin, b)
    tl.store(out + at, first.to(out.dtype.element_ty), mask)
    tl.store(out + at + half, second.to(out.dtype.element_ty), mask)


def _tile(dim):
    block = max(16, power_of_2(dim // 2))
    return max(1, _PAIRS // block), block


def rotary(qkv, angles, inverse):
    out = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    tokens, _, heads, dim = qkv.shape
    if out.numel():
        rows, block = _tile(dim)
        _turn[cdiv(tokens * 3 * heads, rows),](
            *(qkv.contiguous(), angles.contiguous(), out, tokens, inverse, heads, dim),
            *(rows, block),
            num_warps=_WARPS,
        )
    return out


def shipped():
    for x in ("*bf16", "*fp16", "*fp32"):
        for heads, dim in ((12, 64), (16, 128), (5, 22)) if x == "*bf16" else ((12, 64),):
            for inverse in (False, True):
                rows, block = _tile(dim)
                types = {"qkv": x, "angles": "*fp32", "out": x, "tokens": "i32"}
                constants = {"INVERSE": inverse, "HEADS": heads, "DIM": dim}
                yield Spec(_turn, types, constants | {"R": rows, "BLOCK": block}, _WARPS)
