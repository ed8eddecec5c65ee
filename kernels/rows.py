"""What the kernels that go row by row share: tiles of whole rows, layer norm in fp32, and column
sums in two stages without atomics, so that a result is the same bits every time on a device."""

import functools

import torch
import triton
import triton.language as tl

from .jit import cdiv, jit, power_of_2
from .spec import Spec

_COLUMNS, _PARTS = 64, 32  # of a tile of `_sum_partials`


@functools.cache
def tile(hidden: int, setting: tuple[int, ...]) -> tuple[int, int, int]:
    """(BLOCK, R, warps): R rows of BLOCK columns. The setting starts with rows and warps for 513
    to 1024 columns; of others as many values a thread.

    A warp's 16-byte accesses of bf16 span 256 columns: four spread a row of 1024, which few rows
    need; one needs no shared memory for its sums, and drops the part of a row of 768 behind N when
    compiled, dropout's bits with it.
    """
    rows, warps = setting[:2]
    block, values = max(16, power_of_2(hidden)), 1024 * rows
    return block, max(1, values // block), min(16, max(1, block // values) * warps)


@functools.cache
def programs(device: torch.device, each: int) -> int:
    """Of a backward, `each` on a processor: enough to fill the GPU, few enough that their partial
    sums cost little."""
    if device.type != "cuda":
        return 3  # the interpreter's: several tiles each
    return each * torch.cuda.get_device_properties(device).multi_processor_count


def as_int32(threshold: int) -> int:
    """The same 32 bits in the one integer type that the kernels are compiled for."""
    return threshold - 2**32 if threshold >= 2**31 else threshold


@triton.jit
def load_columns(pointer, j, N: tl.constexpr):
    return tl.load(pointer + j, j < N, other=0, eviction_policy="evict_last").to(tl.float32)


@triton.jit
def load_once(pointers, mask):
    """In fp32, what no other program reads: the L2 may forget it first."""
    return tl.load(pointers, mask, other=0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def centre(s, mean, mask, N: tl.constexpr):
    """s - mean [R, BLOCK], 0 outside mask; then less what the mean's rounding left."""
    s = tl.where(mask, s - mean[:, None], 0)
    return tl.where(mask, s - (tl.sum(s, 1) / N)[:, None], 0)


@triton.jit
def statistics(s, mask, eps, N: tl.constexpr, RMS: tl.constexpr = False):
    """mean [R], rstd [R] and s - mean [R, BLOCK] of rows of N values; s is 0 outside mask. RMS
    norm's mean is 0."""
    mean = tl.sum(s, 1) / N
    centred = centre(s, mean, mask, N)
    if RMS:
        mean = tl.zeros_like(mean)
        centred = s
    return mean, tl.rsqrt(tl.sum(centred * centred, 1) / N + eps), centred


@triton.jit
def gradient(scaled, normed, rstd, N: tl.constexpr, RMS: tl.constexpr = False):
    """Of the sum that was normalised; scaled = grad * weight, 0 outside the rows, as normed."""
    if RMS:
        b = tl.sum(scaled * normed, 1) / N
        return (scaled - normed * b[:, None]) * rstd[:, None]
    elif N == 1:  # a fused product would leave the rounding of scaled's mean, times rstd
        return tl.zeros_like(scaled)
    else:
        a = tl.sum(scaled, 1) / N
        b = tl.sum(scaled * normed, 1) / N
        return (scaled - a[:, None] - normed * b[:, None]) * rstd[:, None]


@jit(do_not_specialize=["parts"])
def _sum_partials(
    partial, out0, out1, out2, parts,
    N: tl.constexpr, SUMS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out_k [N] = sum over p of partial [parts, SUMS, N] [p, k]; None from out_SUMS on."""
    j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.program_id(1)
    total = tl.zeros([PARTS, COLUMNS], tl.float32)
    for start in range(0, parts, PARTS):
        p = start + tl.arange(0, PARTS)
        at = (p[:, None] * SUMS + k) * N + j[None, :]
        total += tl.load(partial + at, (p < parts)[:, None] & (j < N)[None, :], other=0)
    result = tl.sum(total, 0)
    if k == 0:
        tl.store(out0 + j, result.to(out0.dtype.element_ty), j < N)
    if SUMS > 1:  # noqa: SIM102  decided when compiled: None has no type
        if k == 1:
            tl.store(out1 + j, result.to(out1.dtype.element_ty), j < N)
    if SUMS > 2:  # noqa: SIM102
        if k == 2:
            tl.store(out2 + j, result.to(out2.dtype.element_ty), j < N)


def sum_partials(partial, out0, out1=None, out2=None):
    parts, sums, n = partial.shape
    _sum_partials[cdiv(n, _COLUMNS), sums](
        *(partial, out0, out1, out2, parts, n, sums, _COLUMNS, _PARTS), num_warps=4
    )


def shipped():
    for out in ("*fp32", "*bf16", "*fp16"):
        for sums in (1, 2, 3):
            types = {"partial": "*fp32", "parts": "i32"} | {f"out{k}": out for k in range(sums)}
            constants = {"N": 768, "SUMS": sums, "COLUMNS": _COLUMNS, "PARTS": _PARTS}
            constants |= {f"out{k}": None for k in range(sums, 3)}
            yield Spec(_sum_partials, types, constants, 4)
