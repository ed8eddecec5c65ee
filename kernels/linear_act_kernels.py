"""The Triton kernels of linear_act; `linear_act.py` launches them."""

import triton
import triton.language as tl

from .dot import dot
from .jit import jit

PIECE = tl.constexpr(64)  # columns that an epilogue holds at once, for the registers' sake


@triton.jit
def _tail(z):
    """(u, Phi(-u), exp(-u * u / 2)) of u = |z|, fp32, for results in 16 bits: Phi, the normal
    distribution, within 1.1e-6, and its tail within 0.7 % to 6. Libdevice's erf takes twice as
    many instructions. The form is Abramowitz and Stegun's 7.1.26, its constants a minimax fit."""
    u = tl.minimum(tl.abs(z), 30.0, propagate_nan=tl.PropagateNan.ALL)  # so that inf gives 0
    t = tl.rsqrt(1 + 0.425 * u)
    t *= t  # 1 / (1 + ...), which takes nine instructions as a division
    e = tl.exp2(-0.7213475204444817 * u * u)
    p = ((-0.11944055 * t + 0.36263913) * t + 0.07161268) * t + 0.18518798
    return u, e * (t * p), e


@triton.jit
def activate(z, ACT: tl.constexpr, EXACT: tl.constexpr):
    """None, GELU, its tanh approximation, ReLU or SiLU of z, fp32; EXACT: to fp32's precision."""
    if ACT == 1 and not EXACT:
        u, tail, _ = _tail(z)
        z = tl.maximum(z, 0.0) - u * tail  # a NaN is in the tail
    elif ACT == 1 or ACT == 2:
        z = tl.where(z < -30, -30.0, z)  # so that -inf gives its limit 0
        if ACT == 1:
            z = 0.5 * z * (1 + tl.math.erf(z * 0.7071067811865476))
        else:  # (1 + tanh u) / 2 = 1 / (1 + exp(-2 u))
            z = z / (1 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
    if ACT == 3:
        z = tl.where(z < 0, 0.0, z)
    if ACT == 4:
        z = tl.where(z < -100, -100.0, z)  # likewise
        z = z / (1 + tl.exp(-z))
    return z


@triton.jit
def derivative(z, ACT: tl.constexpr, EXACT: tl.constexpr):
    """activation'(z), fp32; EXACT: to fp32's precision."""
    if ACT == 0:
        d = tl.full(z.shape, 1.0, tl.float32)
    elif ACT == 3:
        d = tl.where(z > 0, 1.0, 0.0)
    elif ACT == 4:
        z = tl.where(z < -88, -88.0, tl.where(z > 88, 88.0, z))  # the limits at infinity
        s = 1 / (1 + tl.exp(-z))
        d = s + z * s * (1 - s)
    elif ACT == 1 and not EXACT:
        u, tail, e = _tail(z)
        d = tail - 0.3989422804014327 * u * e  # at -|z|
        d = tl.where(z < 0, d, 1 - d)
    else:
        z = tl.where(z < -30, -30.0, tl.where(z > 30, 30.0, z))  # the limits 0 and 1 at infinity
        if ACT == 1:
            d = 0.5 * (1 + tl.math.erf(z * 0.7071067811865476))
            d += z * tl.exp(-0.5 * z * z) * 0.3989422804014327
        else:
            s = 1 / (1 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
            d = s + z * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * z * z)
    return d


@triton.jit
def _halves(acc):
    return acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _finish(
    acc, m0, n0, part, b, y, z, M, N: tl.constexpr, PARTS: tl.constexpr, ACT: tl.constexpr,
    EXACT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The epilogue: bias, z, activation, y for the tile at (m0, n0) of a part."""
    rn = n0 + tl.arange(0, acc.shape[1])
    if b is not None:
        acc += tl.load(b + rn, mask=rn < N, other=0).to(tl.float32)[None, :]
    if TMA:
        if z is not None:
            z.store([m0, n0], acc.to(z.dtype))  # which goes on while the activation is computed
        y.store([m0, n0], activate(acc, ACT, EXACT).to(y.dtype))
    else:
        rm = m0 + tl.arange(0, acc.shape[0])
        at = rm.to(tl.int64)[:, None] * (PARTS * N) + (part * N + rn)[None, :]
        inside = (rm < M)[:, None] & (rn < N)[None, :]
        if z is not None:
            tl.store(z + at, acc.to(z.dtype.element_ty), mask=inside)
        tl.store(y + at, activate(acc, ACT, EXACT).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _finish_pair(
    acc, m0, n0, part, b, y, z, M, N: tl.constexpr, PARTS: tl.constexpr, ACT: tl.constexpr,
    EXACT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """_finish for one piece or two."""
    if acc.shape[1] > PIECE:
        left, right = _halves(acc)
        _finish(left, m0, n0, part, b, y, z, M, N, PARTS, ACT, EXACT, TMA)
        n0 += acc.shape[1] // 2
        _finish(right, m0, n0, part, b, y, z, M, N, PARTS, ACT, EXACT, TMA)
    else:
        _finish(acc, m0, n0, part, b, y, z, M, N, PARTS, ACT, EXACT, TMA)


@jit(do_not_specialize=["M"])  # it changes with every batch
def product(
    x,  # [M, K], pointer or descriptor
    w0,  # PARTS weights [N, K], pointers or one descriptor
    w1,
    w2,
    b0,  # PARTS biases [N], or None
    b1,
    b2,
    y,  # [M, PARTS * N], pointer or descriptor
    z,  # [M, PARTS * N], the same, or None
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    X_M: tl.constexpr,  # strides
    W_N: tl.constexpr,
    W_K: tl.constexpr,
    PARTS: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    PERSISTENT: tl.constexpr,
    EXACT: tl.constexpr,
):
    """y = activation(x @ w.T + bias), z = its argument."""
    blocks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    columns: tl.constexpr = blocks * PARTS
    rows = tl.cdiv(M, BLOCK_M)
    for tile in tl.range(tl.program_id(0), rows * columns, tl.num_programs(0), flatten=PERSISTENT):
        top = tile // (GROUP * columns) * GROUP
        height = min(rows - top, GROUP)
        within = tile % (GROUP * columns)
        m0 = (top + within % height) * BLOCK_M
        part = within // height // blocks
        n0 = within // height % blocks * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if TMA:
            for k in range(0, K, BLOCK_K):
                acc = dot(x.load([m0, k]), w0.load([n0, k]).T, acc, PRECISION)
        else:
            w = w0
            if PARTS == 3:
                w = tl.where(part == 0, w0, tl.where(part == 1, w1, w2))
            # Rows past the end repeat the last one: their products are not stored.
            xm = tl.minimum(m0 + tl.arange(0, BLOCK_M), M - 1).to(tl.int64)
            rn = n0 + tl.arange(0, BLOCK_N)
            wn = rn if N % BLOCK_N == 0 else tl.minimum(rn, N - 1)
            rk = tl.arange(0, BLOCK_K).to(tl.int64)
            xp = x + xm[:, None] * X_M + rk[None, :]
            wp = w + wn.to(tl.int64)[None, :] * W_N + rk[:, None] * W_K
            for k in range(0, K, BLOCK_K):
                if K % BLOCK_K == 0:
                    a = tl.load(xp)
                    b = tl.load(wp)
                else:
                    a = tl.load(xp, mask=rk[None, :] < K - k, other=0)
                    b = tl.load(wp, mask=rk[:, None] < K - k, other=0)
                acc = dot(a, b, acc, PRECISION)
                xp += BLOCK_K
                wp += BLOCK_K * W_K
        b = b0
        if PARTS == 3 and b0 is not None:
            b = tl.where(part == 0, b0, tl.where(part == 1, b1, b2))
        if BLOCK_N > 2 * PIECE:
            half: tl.constexpr = BLOCK_N // 2
            left, right = _halves(acc)
            _finish_pair(left, m0, n0, part, b, y, z, M, N, PARTS, ACT, EXACT, TMA)
            _finish_pair(right, m0, n0 + half, part, b, y, z, M, N, PARTS, ACT, EXACT, TMA)
        else:
            _finish_pair(acc, m0, n0, part, b, y, z, M, N, PARTS, ACT, EXACT, TMA)


@jit
def activation(z, y, size, ACT: tl.constexpr, BLOCK: tl.constexpr):
    """y = activation(z), flat."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(z + at, mask=at < size, other=0).to(tl.float32)
    EXACT: tl.constexpr = y.dtype.element_ty == tl.float32
    tl.store(y + at, activate(value, ACT, EXACT).to(y.dtype.element_ty), mask=at < size)


@jit(do_not_specialize=["M", "chunk"])
def gradient(
    grad,  # [M, N], rows STRIDE apart
    z,  # [M, N]; None without an activation
    dz,  # [M, N]; None where only sums are wanted
    sums,  # [chunks, N] or None: over each `chunk` rows
    M,
    chunk,
    N: tl.constexpr,
    STRIDE: tl.constexpr,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,  # steps whose loads are under way
):
    """dz = grad * activation'(z), and column sums of it."""
    rn = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.program_id(1) * chunk
    # Added up over the rows once, at the end: each sum between threads takes a barrier.
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for row in tl.range(start, min(start + chunk, M), ROWS, num_stages=STAGES):
        rm = (row + tl.arange(0, ROWS)).to(tl.int64)
        inside = (rm < M)[:, None]
        if N % COLUMNS != 0:
            inside &= (rn < N)[None, :]
        value = tl.load(grad + rm[:, None] * STRIDE + rn[None, :], mask=inside, other=0)
        value = value.to(tl.float32)
        if z is not None:
            EXACT: tl.constexpr = dz.dtype.element_ty == tl.float32
            at = rm[:, None] * N + rn[None, :]
            argument = tl.load(z + at, mask=inside, other=0).to(tl.float32)
            value *= derivative(argument, ACT, EXACT)
            tl.store(dz + at, value.to(dz.dtype.element_ty), mask=inside)
        total += value
    if sums is not None:
        at = tl.program_id(1).to(tl.int64) * N + rn
        tl.store(sums + at, tl.sum(total, 0).to(sums.dtype.element_ty), mask=rn < N)
