"""Attention over packed sequences, forward; see bertfast/ops/attention.py.

The softmax is in tiles as in FlashAttention-2 (Dao, arXiv:2307.08691), in base 2. Where all keys
of a sequence fit one tile there is nothing to rescale, and the loop over keys falls away.

Shapes: q [tokens_q, HEADS, DIM]; k, v [tokens_k, HEADS, DIM], of equal strides; out as q, dense;
lse fp32 [HEADS, tokens_q]; starts_q, starts_k int32 [batch + 1]; bias by its batch, head and query
strides, 0 where it broadcasts; seed int64 [2]. D is DIM rounded up to a power of two.
"""

import math

import torch
import triton
import triton.language as tl

from .attention_launch import (
    arguments,
    bounded,
    choose,
    dense_last,
    launch,
    variants,
    work,
)
from .attention_relative import relative
from .attention_tile import (
    _LOG2E,
    kept,
    load_rows,
    near,
    place,
    scores,
    span,
    store_rows,
    words_offset,
)
from .dot import dot
from .jit import jit

_LN2 = tl.constexpr(math.log(2))


@triton.jit
def _step(
    acc, top, total, query, k, v, row, first, end, queries, keys, start_q, head,
    bias, bias_query, seed, offset, rel_key, rel_query, rel_index, window, scale, zero, threshold,
    K_TOKEN: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """Adds the tiles of keys from `first` to `end`; FULL tiles need no mask and have no bias."""
    column = tl.arange(0, N)
    at_query = row + tl.arange(0, M)[:, None]
    for at in range(first, end, N):
        if seed is not None:
            keep = kept(seed, offset, start_q + row, head, at, threshold, HEADS, M, N)
        key = load_rows(k, at + column, keys, K_TOKEN, DIM, D, FULL)
        s = dot(query, tl.trans(key), tl.zeros([M, N], tl.float32), PRECISION)
        if FULL:
            new = tl.maximum(top, tl.max(s, 1) * (scale * _LOG2E))
            shift = tl.where(new == float("-inf"), 0.0, new)
            p = tl.exp2(s * (scale * _LOG2E) - shift[:, None])
        else:
            at_key = at + column[None, :]
            s = relative(
                s, query, key, row - at, queries, rel_key, rel_query, rel_index,
                HEADS, DIM, D, True, PRECISION,
            )  # fmt: skip
            s = scores(
                s, row, at_query, at_key, queries, keys, bias, bias_query, scale, window, CAUSAL
            )
            new = tl.maximum(top, tl.max(s, 1))
            shift = tl.where(new == float("-inf"), 0.0, new)
            p = tl.exp2(s - shift[:, None])
        rescale = tl.exp2(top - shift)
        total = total * rescale + tl.sum(p, 1)
        if seed is not None:
            p = tl.where(keep, p, zero)
        value = load_rows(v, at + column, keys, K_TOKEN, DIM, D, FULL)
        acc = acc * rescale[:, None]
        acc = dot(p.to(value.dtype), value, acc, PRECISION)
        top = new
    return acc, top, total


@jit(do_not_specialize=["batch", "tokens"])
def _forward(
    q, k, v, out, lse, starts_q, starts_k, seqused_k, bias, seed, rel_key, rel_query, rel_index,
    window, bias_batch, bias_head, bias_query, batch, tokens, blocks, scale, keep_scale, threshold,
    Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, K_TOKEN: tl.constexpr, K_HEAD: tl.constexpr,
    HEADS: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    ONE_PASS: tl.constexpr,
):  # fmt: skip
    """A program is a block of M queries of one head and sequence; heads are neighbours."""
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    sequence, block = place(starts_q, tl.program_id(0) // HEADS, batch, blocks, M)
    start_q, queries = span(starts_q, sequence)
    if block * M >= queries:
        return
    start_k, keys = span(starts_k, sequence, seqused_k)
    q += start_q.to(tl.int64) * Q_TOKEN + head * Q_HEAD
    k += start_k.to(tl.int64) * K_TOKEN + head * K_HEAD
    v += start_k.to(tl.int64) * K_TOKEN + head * K_HEAD
    if bias is not None:
        bias += sequence.to(tl.int64) * bias_batch + head * bias_head
    if rel_key is not None:
        rel_key += head * DIM
    if rel_query is not None:
        rel_query += head * DIM
    row = block * M + tl.arange(0, M)
    column = tl.arange(0, N)
    query = load_rows(q, row, queries, Q_TOKEN, DIM, D)
    offset = None if seed is None else words_offset(seed, M, N)
    # Not a constant: the compiler would drop values after rounding them to 16 bits, one by one.
    zero = tl.minimum(keep_scale, 0.0)
    if ONE_PASS:
        if seed is not None:
            keep = kept(seed, offset, start_q + block * M, head, 0, threshold, HEADS, M, N)
        key = load_rows(k, column, keys, K_TOKEN, DIM, D)
        value = load_rows(v, column, keys, K_TOKEN, DIM, D)
        s = dot(query, tl.trans(key), tl.zeros([M, N], tl.float32), PRECISION)
        at = column[None, :]
        s = relative(
            s, query, key, block * M, queries, rel_key, rel_query, rel_index,
            HEADS, DIM, D, True, PRECISION,
        )  # fmt: skip
        s = scores(
            s, block * M, row[:, None], at, queries, keys, bias, bias_query, scale, window, CAUSAL
        )
        top = tl.max(s, 1)
        shift = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp2(s - shift[:, None])
        total = tl.sum(p, 1)
        if seed is not None:
            p = tl.where(keep, p, zero)
        acc = dot(p.to(value.dtype), value, tl.zeros([M, D], tl.float32), PRECISION)
    else:
        end = tl.minimum(keys, (block + 1) * M) if CAUSAL else keys
        top = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, D], tl.float32)
        first = 0
        if window is not None:
            first, end = near(first, end, block * M, window, M, N)
        PLAIN: tl.constexpr = bias is None and window is None and rel_index is None
        PEEL: tl.constexpr = PLAIN and not CAUSAL and q.dtype.element_ty != tl.float32
        if PEEL:  # all but the last tile; scale < 0 would turn the maximum; fp32 would spill
            first = tl.where(scale < 0, 0, keys // N * N)
            acc, top, total = _step(
                acc, top, total, query, k, v, block * M, 0, first, queries, keys, start_q, head,
                bias, bias_query, seed, offset, rel_key, rel_query, rel_index, window, scale, zero,
                threshold, K_TOKEN, HEADS, DIM, D, CAUSAL, PRECISION, M, N, True,
            )  # fmt: skip
        acc, top, total = _step(
            acc, top, total, query, k, v, block * M, first, end, queries, keys, start_q, head,
            bias, bias_query, seed, offset, rel_key, rel_query, rel_index, window, scale, zero,
            threshold, K_TOKEN, HEADS, DIM, D, CAUSAL, PRECISION, M, N, False,
        )  # fmt: skip
        shift = tl.where(top == float("-inf"), 0.0, top)
    # A row without a key sums to 0; +inf makes its probabilities 0 in backward too.
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    inverse = tl.where(empty, 0.0, (1.0 if seed is None else keep_scale) / total)
    acc = acc * inverse[:, None]
    out += (start_q.to(tl.int64) * HEADS + head) * DIM
    store_rows(out, acc, row, queries, HEADS * DIM, DIM, D)
    log = tl.where(empty, float("inf"), (shift + tl.log2(total)) * _LN2)
    tl.store(lse + head * tokens + start_q + row, log, mask=row < queries)


def cross_forward(
    q, kv, starts_q, starts_k, longest_q, longest_k, scale, dropout_p, seed, causal, bias,
    seqused_k=None, window=None, rel_key=None, rel_query=None, rel_index=None, launch=launch,
):  # fmt: skip
    """The operator `cross_attention`: out [tokens_q, heads, dim], lse [heads, tokens_q]."""
    q, kv = dense_last(q), dense_last(kv)
    k, v = kv.unbind(1)
    tokens, heads, dim = q.shape
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    window = bounded(window, longest_k)
    a = arguments(
        q, k, v, starts_q, starts_k, scale, dropout_p, seed, causal, bias, seqused_k, window,
        rel_key, rel_query, rel_index,
    )  # fmt: skip
    seen = longest_k if window is None else 2 * window + 1
    kernel = "forward" if rel_index is None else "forward relative"
    tile = choose(kernel, launch.arch(q.device), q, seen, bias, window)
    items, blocks = work(tokens, starts_q, longest_q, tile.m)
    a |= dict(out=out, lse=lse, blocks=blocks, ONE_PASS=longest_k <= tile.n)
    launch(_forward, items * heads, tile, a)
    return out, lse


def forward(qkv, starts, longest, *options, launch=launch):
    """The operator `attention`."""
    q, kv = qkv[:, 0], qkv[:, 1:]
    return cross_forward(q, kv, starts, starts, longest, longest, *options, launch=launch)


def shipped():
    yield from variants(lambda launch, *arguments: forward(*arguments, launch=launch))
