"""Attention's forward in other ways than kernels/attention.py, for bf16 and fp16 heads of 32, 64 or
128, without bias or causal mask.

Keys and values of full tiles by tensor descriptors; a quarter of the exponentials by polynomials,
as the special function units are what a head of 64 waits for; programs that stay and take items in
turn, the next one's loads under way; warps specialised by the compiler; dropout's bits made once by
a kernel of its own, which backward could read as well. (q k^T a tile ahead of its softmax is not
among them: Triton 3.9 waits for it at once.)
"""

import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from bertfast.kernels.attention import _LN2
from bertfast.kernels.attention_launch import arguments, work
from bertfast.kernels.attention_tile import (
    _LOG2E,
    kept,
    load_rows,
    place,
    span,
    store_rows,
    words_offset,
)
from bertfast.kernels.dot import INTERPRETED, dot
from bertfast.kernels.jit import cdiv, jit
from bertfast.kernels.philox import bit, keep_words, offsets
from triton.tools.tensor_descriptor import TensorDescriptor

from variants.record import Box, spec_of

BITS = tl.constexpr(32)  # keys in a stored word of dropout's bits


class Variant(NamedTuple):
    m: int
    n: int
    warps: int
    stages: int = 2
    tma: bool = False  # full tiles of keys and values by descriptors
    specialize: bool = False  # by `specialized`, without dropout
    programs: int = 0  # on a processor, which stay; 0: a program an item
    poly: bool = False
    stored: bool = False  # dropout's bits, by `words`


# 2^x = 2^i 2^f, f in [-1/2, 1/2], for one value of four, 2^f by a cubic within 8e-5 of it; P is
# rounded to 16 bits, 4e-3. Not yet right for NaN and -inf, which a shipped one has to be.
_FOUR = tl.constexpr("""{
.reg .f32 t, f, p; .reg .b32 i, r;
ex2.approx.ftz.f32 $0, $4;
ex2.approx.ftz.f32 $1, $5;
ex2.approx.ftz.f32 $2, $6;
max.f32 t, $7, 0fC2FC0000;
add.rn.f32 f, t, 0f4B400000;
mov.b32 i, f;
sub.rn.f32 f, f, 0f4B400000;
sub.rn.f32 f, t, f;
fma.rn.f32 p, f, 0f3D61FBB0, 0f3E786F0E;
fma.rn.f32 p, p, f, 0f3F31798D;
fma.rn.f32 p, p, f, 0f3F7FFB49;
shl.b32 i, i, 23;
mov.b32 r, p;
add.s32 r, r, i;
mov.b32 $3, r;
}""")


@triton.jit
def _exp2(x, POLY: tl.constexpr):
    if POLY and not INTERPRETED:
        return tl.inline_asm_elementwise(
            _FOUR, "=f,=f,=f,=f,f,f,f,f", [x], dtype=tl.float32, is_pure=True, pack=4
        )
    else:
        return tl.exp2(x)


@triton.jit
def _keep(
    seed, words, offset, token, head, key, threshold,
    HEADS: tl.constexpr, WORDS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, tokens,
):  # fmt: skip
    """`kept`, or from the bits that `words_of` has stored; None without dropout."""
    if seed is None:
        return None
    elif words is None:
        return kept(seed, offset, token, head, key, threshold, HEADS, M, N)
    else:
        row = token + tl.arange(0, M)
        column = key // BITS + tl.arange(0, N // BITS)
        at = (row.to(tl.int64) * HEADS + head)[:, None] * WORDS + column[None, :]
        found = tl.load(words + at, mask=(row < tokens)[:, None] & (column < WORDS)[None, :])
        found = tl.broadcast_to(found[:, :, None], [M, N // BITS, BITS])
        return bit(tl.reshape(found, [M, N]), (tl.arange(0, N) & (BITS - 1))[None, :])


@triton.jit
def _fold(acc, top, total, s, value, keep, scale, zero, DROP: tl.constexpr, POLY: tl.constexpr):
    """Adds a tile of scores and its values."""
    new = tl.maximum(top, tl.max(s, 1) * scale)
    shift = tl.where(new == float("-inf"), 0.0, new)
    p = _exp2(s * scale - shift[:, None], POLY)
    rescale = tl.exp2(top - shift)
    total = total * rescale + tl.sum(p, 1)
    if DROP:
        p = tl.where(keep, p, zero)
    acc = dot(p.to(value.dtype), value, acc * rescale[:, None], "ieee")
    return acc, new, total


@triton.jit
def _item(
    item, q, k, v, k_rows, v_rows, out, lse, starts, seed, words, batch, tokens, blocks, scale,
    keep_scale, threshold,
    Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, K_TOKEN: tl.constexpr, K_HEAD: tl.constexpr,
    HEADS: tl.constexpr, DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    WORDS: tl.constexpr, ONE_PASS: tl.constexpr, TMA: tl.constexpr, POLY: tl.constexpr,
):  # fmt: skip
    """A block of M queries of one head and sequence."""
    head = tl.cast(item % HEADS, tl.int64)
    sequence, block = place(starts, item // HEADS, batch, blocks, M)
    start, keys = span(starts, sequence)
    row = block * M + tl.arange(0, M)
    column = tl.arange(0, N)
    q += start.to(tl.int64) * Q_TOKEN + head * Q_HEAD
    k += start.to(tl.int64) * K_TOKEN + head * K_HEAD
    v += start.to(tl.int64) * K_TOKEN + head * K_HEAD
    # Past the sequences' last block there are none.
    query = load_rows(q, row, keys, Q_TOKEN, DIM, DIM)
    DROP: tl.constexpr = seed is not None
    offset = None
    if DROP and words is None:
        offset = words_offset(seed, M, N)
    zero = tl.minimum(keep_scale, 0.0)
    scale = scale * _LOG2E
    first = start + block * M
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DIM], tl.float32)
    end = 0
    if not ONE_PASS:
        end = tl.where((scale < 0) | (block * M >= keys), 0, keys // N * N)
        place_k = (head * DIM).to(tl.int32)
        for at in range(0, end, N):
            keep = _keep(
                seed, words, offset, first, head, at, threshold, HEADS, WORDS, M, N, tokens
            )
            if TMA:
                key = k_rows.load([start + at, place_k])
                value = v_rows.load([start + at, place_k])
            else:
                key = load_rows(k, at + column, keys, K_TOKEN, DIM, DIM, True)
                value = load_rows(v, at + column, keys, K_TOKEN, DIM, DIM, True)
            s = dot(query, tl.trans(key), tl.zeros([M, N], tl.float32), "ieee")
            acc, top, total = _fold(acc, top, total, s, value, keep, scale, zero, DROP, POLY)
    if ONE_PASS:
        keep = _keep(seed, words, offset, first, head, 0, threshold, HEADS, WORDS, M, N, tokens)
        key = load_rows(k, column, keys, K_TOKEN, DIM, DIM)
        value = load_rows(v, column, keys, K_TOKEN, DIM, DIM)
        s = dot(query, tl.trans(key), tl.zeros([M, N], tl.float32), "ieee")
        s = tl.where((column < keys)[None, :], s * scale, float("-inf"))
        acc, top, total = _fold(acc, top, total, s, value, keep, 1.0, zero, DROP, POLY)
    else:
        for at in range(end, keys, N):  # what is masked
            keep = _keep(
                seed, words, offset, first, head, at, threshold, HEADS, WORDS, M, N, tokens
            )
            key = load_rows(k, at + column, keys, K_TOKEN, DIM, DIM)
            value = load_rows(v, at + column, keys, K_TOKEN, DIM, DIM)
            s = dot(query, tl.trans(key), tl.zeros([M, N], tl.float32), "ieee")
            s = tl.where((at + column < keys)[None, :], s * scale, float("-inf"))
            acc, top, total = _fold(acc, top, total, s, value, keep, 1.0, zero, DROP, False)
    shift = tl.where(top == float("-inf"), 0.0, top)
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    inverse = tl.where(empty, 0.0, (1.0 if seed is None else keep_scale) / total)
    out += (start.to(tl.int64) * HEADS + head) * DIM
    store_rows(out, acc * inverse[:, None], row, keys, HEADS * DIM, DIM, DIM)
    log = tl.where(empty, float("inf"), (shift + tl.log2(total)) * _LN2)
    tl.store(lse + head * tokens + start + row, log, mask=row < keys)


@jit(do_not_specialize=["batch", "tokens", "items"])
def forward(
    q, k, v, k_rows, v_rows, out, lse, starts, seed, words, batch, tokens, items, blocks, scale,
    keep_scale, threshold,
    Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, K_TOKEN: tl.constexpr, K_HEAD: tl.constexpr,
    HEADS: tl.constexpr, DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    WORDS: tl.constexpr, ONE_PASS: tl.constexpr, TMA: tl.constexpr, POLY: tl.constexpr,
    STAY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """k_rows, v_rows: descriptors of k and v as [tokens, HEADS * DIM], or None."""
    if STAY:
        for item in tl.range(tl.program_id(0), items, tl.num_programs(0), num_stages=STAGES):
            _item(
                item, q, k, v, k_rows, v_rows, out, lse, starts, seed, words, batch, tokens,
                blocks, scale, keep_scale, threshold, Q_TOKEN, Q_HEAD, K_TOKEN, K_HEAD, HEADS,
                DIM, M, N, WORDS, ONE_PASS, TMA, POLY,
            )  # fmt: skip
    else:
        _item(
            tl.program_id(0), q, k, v, k_rows, v_rows, out, lse, starts, seed, words, batch,
            tokens, blocks, scale, keep_scale, threshold, Q_TOKEN, Q_HEAD, K_TOKEN, K_HEAD, HEADS,
            DIM, M, N, WORDS, ONE_PASS, TMA, POLY,
        )  # fmt: skip


@jit(do_not_specialize=["batch", "tokens"])
def specialized(
    q_rows, k_rows, v_rows, out, lse, starts, batch, tokens, blocks, scale,
    HEADS: tl.constexpr, DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """What Triton's pass for Hopper takes: one loop, all loads by descriptors, four warps and 64
    queries. Values behind a sequence's end must be finite here, which a shipped one can't ask."""
    head = tl.program_id(0) % HEADS
    sequence, block = place(starts, tl.program_id(0) // HEADS, batch, blocks, M)
    start, keys = span(starts, sequence)
    row = block * M + tl.arange(0, M)
    scale = scale * _LOG2E
    query = q_rows.load([start + block * M, head * DIM])
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, DIM], tl.float32)
    for at in tl.range(0, keys, N, warp_specialize=True):
        key = k_rows.load([start + at, head * DIM])
        s = dot(query, tl.trans(key), tl.zeros([M, N], tl.float32), "ieee") * scale
        s = tl.where((at + tl.arange(0, N) < keys)[None, :], s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        rescale = tl.exp2(top - new)
        total = total * rescale + tl.sum(p, 1)
        value = v_rows.load([start + at, head * DIM])
        acc = dot(p.to(value.dtype), value, acc * rescale[:, None], "ieee")
        top = new
    out += (start.to(tl.int64) * HEADS + head) * DIM
    store_rows(out, acc / total[:, None], row, keys, HEADS * DIM, DIM, DIM)
    log = (top + tl.log2(total)) * _LN2
    tl.store(lse + tl.cast(head, tl.int64) * tokens + start + row, log, mask=row < keys)


@jit(do_not_specialize=["batch"])
def words_of(
    words, starts, seed, batch, blocks, threshold,
    HEADS: tl.constexpr, WORDS: tl.constexpr, M: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """words int32 [tokens, HEADS, WORDS]: which keys of a row are kept, 32 a word."""
    head = tl.program_id(0) % HEADS
    sequence, block = place(starts, tl.program_id(0) // HEADS, batch, blocks, M)
    start, keys = span(starts, sequence)
    row = block * M + tl.arange(0, M)
    offset = offsets(seed, M, W)
    at_row = (start + row).to(tl.int64) * HEADS + head
    for at in range(0, tl.where(block * M < keys, keys, 0), W * BITS):
        column = at // BITS + tl.arange(0, W)
        made = keep_words(
            seed, offset, at_row[:, None], (column * (BITS // 4))[None, :], threshold, BITS
        )
        inside = (row < keys)[:, None] & (column < WORDS)[None, :]
        tl.store(words + at_row[:, None] * WORDS + column[None, :], made, mask=inside)


ROWS, COLUMNS = 16, 8  # of a tile of `words_of`
WORDS_BY = Variant(ROWS, COLUMNS, 4)


def run(qkv, starts, longest, scale, p, seed, variant, launch=None):
    """out [tokens, heads, dim], lse fp32 [heads, tokens], as `attention.forward`."""
    launch = launch or _launch
    q, k, v = qkv.unbind(1)
    tokens, heads, dim = q.shape
    if dim not in (32, 64, 128):
        raise ValueError(f"heads of {dim}, expected 32, 64 or 128")
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    a = arguments(q, k, v, starts, starts, scale, p, seed, False, None, None)
    items, blocks = work(tokens, starts, longest, variant.m)
    a |= dict(out=out, lse=lse, starts=starts, blocks=blocks, items=items * heads)
    a |= dict(M=variant.m, N=variant.n, **dict.fromkeys(("q_rows", "k_rows", "v_rows", "words")))
    if variant.tma:
        a |= {f"{name}_rows": _rows(t, rows) for name, t, rows in
              (("q", q, variant.m), ("k", k, variant.n), ("v", v, variant.n))}  # fmt: skip
    if variant.specialize:
        launch(specialized, items * heads, variant, a)
        return out, lse
    a |= dict(WORDS=cdiv(longest, BITS.value), ONE_PASS=longest <= variant.n)
    if variant.stored and p:
        a["words"] = torch.empty((tokens, heads, a["WORDS"]), dtype=torch.int32, device=q.device)
        rows, w_blocks = work(tokens, starts, longest, ROWS)
        launch(words_of, rows * heads, WORDS_BY, a | dict(blocks=w_blocks, M=ROWS, W=COLUMNS))
    a |= dict(TMA=variant.tma, POLY=variant.poly, STAY=variant.programs > 0)
    a |= dict(STAGES=variant.stages if a["ONE_PASS"] else 1)
    grid = items * heads
    if variant.programs:
        grid = min(grid, variant.programs * processors(q.device))
    launch(forward, grid, variant, a)
    return out, lse


def _rows(t, rows):
    """A descriptor of [tokens, heads * dim], a box of `rows` of one head."""
    tokens, heads, dim = t.shape
    if t.device.type == "meta":
        return Box(rows, dim)
    return TensorDescriptor(t, [tokens, heads * dim], [t.stride(0), 1], [rows, dim])


def processors(device) -> int:
    if device.type != "cuda":
        return 2  # the interpreter's
    return torch.cuda.get_device_properties(device).multi_processor_count


def _launch(kernel, grid, variant, a):
    kernel[(grid,)](
        *[a[name] for name in kernel.names], num_warps=variant.warps, num_stages=variant.stages
    )


def candidates(longest: int, dim: int, p: float) -> list[Variant]:
    """What is worth a try at these sizes, in bf16 on Hopper."""
    if longest <= 128:
        base = [Variant(64, 128, 8 if dim == 128 else 4), Variant(128, 128, 8)]
        found = [v._replace(programs=n) for v in base for n in (0, 2, 3)]
        found += [v._replace(poly=True) for v in base]
    else:
        wide = 64 if dim == 128 else 128
        tiles = [Variant(64, 64, 4, 2), Variant(64, 64, 4, 3), Variant(128, 64, 8, 2)]
        tiles += [Variant(128, 64, 8, 3), Variant(128, wide, 8, 2), Variant(64, wide, 4, 2)]
        found = [t._replace(tma=True) for t in tiles]
        found += [t._replace(tma=True, poly=True) for t in tiles]
        found += [t._replace(poly=True) for t in tiles[:4]]
        found += [t._replace(tma=True, programs=n) for t in tiles[2:4] for n in (1, 2)]
        if not p:
            found += [Variant(64, n, 4, 2, tma=True, specialize=True) for n in (64, wide)]
    if p:
        found = [v._replace(stored=True) for v in found] + found[:4]
    return list(dict.fromkeys(found))


def specs():
    """(what it is, `Spec`) of every candidate, with and without dropout."""
    empty, seen = torch.empty, set()
    starts = empty(33, dtype=torch.int32, device="meta")
    seed = empty(2, dtype=torch.int64, device="meta")
    for dim, longest, p in itertools.product((32, 64, 128), (128, 512), (0.0, 0.1)):
        qkv = empty(4096, 3, 12, dim, dtype=torch.bfloat16, device="meta")
        for variant in candidates(longest, dim, p):
            made = []
            record = lambda *launch, made=made: made.append(launch)
            run(qkv, starts, longest, 0.125, p, seed if p else None, variant, record)
            for kernel, _, by, a in made:
                options = f"{kernel.function.__name__}, head {dim}, p={p}, {tuple(by)}"
                spec = spec_of(kernel, a, by.warps, by.stages)
                if repr(spec) not in seen:
                    seen.add(repr(spec))
                    yield options, spec
