"""The product with GELU in its epilogue, in other ways than kernels/linear_act_kernels.py.

GELU by one call of the special function units instead of two, as log2 of the normal distribution's
tail is nearly a polynomial: they take 16 values a clock and processor, 50 million values twice are
a fifth of the product's time. Epilogues in wider or narrower pieces. Warps specialised by the
compiler. Operands and results by tensor descriptors, bf16 and fp16.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from bertfast.kernels.dot import dot
from bertfast.kernels.jit import cdiv, jit
from bertfast.kernels.linear_act import GROUP, _processors
from bertfast.kernels.linear_act_kernels import _halves, _tail
from triton.tools.tensor_descriptor import TensorDescriptor

from variants.record import Box, spec_of


class Variant(NamedTuple):
    m: int
    n: int
    k: int
    warps: int
    stages: int
    programs: int = 1  # on a processor, which take tiles in turn; 0: one program a tile
    piece: int = 64  # columns that an epilogue holds at once
    once: bool = True  # one special function a value
    specialize: bool = False


@triton.jit
def tail_once(z):
    """(u, Phi(-u)) of u = |z|, fp32, within 4e-5 of it to u = 8: 2 to a minimax polynomial."""
    u = tl.minimum(tl.abs(z), 30.0, propagate_nan=tl.PropagateNan.ALL)
    p = ((-1.26245836e-06 * u + 4.82032909e-05) * u - 0.000807248255) * u + 0.00794457877
    p = (((p * u - 0.0526353816) * u - 0.459956837) * u - 1.15060993) * u - 1.00004309
    return u, tl.exp2(p)


@triton.jit
def _gelu(z, ONCE: tl.constexpr):
    if ONCE:
        u, tail = tail_once(z)
    else:
        u, tail, _ = _tail(z)
    return tl.maximum(z, 0.0) - u * tail


@triton.jit
def _finish(acc, m0, n0, bias, y, z, ONCE: tl.constexpr, PIECE: tl.constexpr):
    """Bias, z, GELU, y for the tile at (m0, n0), in pieces."""
    if acc.shape[1] > PIECE:
        left, right = _halves(acc)
        _finish(left, m0, n0, bias, y, z, ONCE, PIECE)
        _finish(right, m0, n0 + acc.shape[1] // 2, bias, y, z, ONCE, PIECE)
    else:
        acc += tl.load(bias + n0 + tl.arange(0, acc.shape[1])).to(tl.float32)[None, :]
        if z is not None:
            z.store([m0, n0], acc.to(z.dtype))
        y.store([m0, n0], _gelu(acc, ONCE).to(y.dtype))


@jit(do_not_specialize=["M"])
def product(
    x, w, bias, y, z, M,
    N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PERSISTENT: tl.constexpr, ONCE: tl.constexpr,
    PIECE: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """y = gelu(x @ w.T + bias), z = its argument or None: descriptors but for bias. BLOCK_N divides
    N, BLOCK_K divides K."""
    columns: tl.constexpr = N // BLOCK_N
    rows = tl.cdiv(M, BLOCK_M)
    for tile in tl.range(
        tl.program_id(0), rows * columns, tl.num_programs(0),
        flatten=PERSISTENT and not SPECIALIZE, warp_specialize=SPECIALIZE,
    ):  # fmt: skip
        top = tile // (GROUP * columns) * GROUP
        height = min(rows - top, GROUP)
        within = tile % (GROUP * columns)
        m0 = (top + within % height) * BLOCK_M
        n0 = within // height * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            acc = dot(x.load([m0, k]), w.load([n0, k]).T, acc, "ieee")
        _finish(acc, m0, n0, bias, y, z, ONCE, PIECE)


def run(x, w, bias, save, variant, launch=None):
    """y [M, N], z or None."""
    (m, k), n, v = x.shape, w.shape[0], variant
    if n % v.n or k % v.k:
        raise ValueError(f"{n} x {k} weights, expected multiples of the tile's {v.n} x {v.k}")
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    z = torch.empty_like(y) if save else None
    grid = cdiv(m, v.m) * (n // v.n)
    if v.programs:
        grid = min(grid, v.programs * _processors(x.device))
    box = [v.m, min(v.n, v.piece)]
    boxes = dict(x=(x, [v.m, v.k]), w=(w, [v.n, v.k]), y=(y, box), z=(z, box))
    a = {name: _described(t, box) for name, (t, box) in boxes.items()}
    a |= dict(bias=bias, M=m, N=n, K=k, BLOCK_M=v.m, BLOCK_N=v.n, BLOCK_K=v.k, GROUP=GROUP)
    a |= dict(PERSISTENT=v.programs > 0, ONCE=v.once, PIECE=v.piece, SPECIALIZE=v.specialize)
    (launch or _launch)(grid, v, a)
    return y, z


def _described(t, box):
    if t is None:
        return None
    return Box(*box) if t.device.type == "meta" else TensorDescriptor.from_tensor(t, box)


def _launch(grid, variant, a):
    product[(grid,)](
        *[a[name] for name in product.names], num_warps=variant.warps, num_stages=variant.stages
    )


PAIR = Variant(128, 128, 64, 4, 3, 2)
LARGE = Variant(128, 256, 64, 8, 4, 1)
CANDIDATES = [
    v._replace(piece=piece, once=once)
    for v in (PAIR, LARGE, Variant(128, 256, 64, 8, 3, 1), Variant(256, 128, 64, 8, 3, 1))
    for piece in (64, 32, 128)
    for once in (True, False)
    if once or piece == 64
]
CANDIDATES += [
    Variant(128, 128, 64, 8, 4, 1), Variant(128, 128, 64, 8, 3, 2), Variant(64, 256, 64, 4, 3, 2),
    # Triton's pass for Hopper takes 64 rows.
    Variant(64, 128, 64, 4, 4, 2, specialize=True), Variant(64, 128, 64, 4, 3, 2, specialize=True),
]  # fmt: skip


def specs():
    for save in (False, True):
        for variant in CANDIDATES:
            x = torch.empty(4096, 768, dtype=torch.bfloat16, device="meta")
            w, made = torch.empty(3072, 768, dtype=x.dtype, device="meta"), []
            run(x, w, w[:, 0], save, variant, lambda *launch, made=made: made.append(launch))
            [(_, _, a)] = made
            what = f"product{', z' * save}, {tuple(variant)}"
            yield what, spec_of(product, a, variant.warps, variant.stages)
