"""Attention over packed sequences, backward; shapes as in attention.py.

Probabilities are recomputed from the log-sum-exp (Dao et al., arXiv:2205.14135). No atomics: each
gradient is summed by one program in a fixed order, so that it is the same bits every time. Short
sequences take one kernel, where a program holds all keys of a head; else one for dQ, then one for
dK and dV.
"""

import torch
import triton
import triton.language as tl

from .attention import kept, load_rows, place, scores, span, square, store_rows
from .attention_launch import arguments, choose, dense_last, launch, variants, work
from .dot import dot
from .jit import jit


@triton.jit
def probabilities(
    product, lse, row, query, key, queries, keys, bias, bias_query, scale, CAUSAL: tl.constexpr
):
    """A tile of q k^T -> softmax, either way round; lse in base 2, +inf for a row without keys."""
    s = scores(product, row, query, key, queries, keys, bias, bias_query, scale, CAUSAL)
    return tl.exp2(s - lse)


@triton.jit
def store_bias_gradient(dbias, ds, row, query, key, queries, keys, dbias_query):
    at = square(dbias, row, query, key, dbias_query)
    tl.store(at, ds, mask=(query < queries) & (key < keys))


@jit(do_not_specialize=["batch", "tokens"])
def _queries(
    q, k, v, out, grad, lse, delta, dq, dbias, starts_q, starts_k, bias, seed,
    bias_batch, bias_head, bias_query, dbias_head, dbias_query,
    batch, tokens, blocks, scale, keep_scale, threshold,
    Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, K_TOKEN: tl.constexpr, K_HEAD: tl.constexpr,
    DQ_TOKEN: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dQ of a block of M queries, and their delta = sum of grad * out, for `_keys`."""
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    sequence, block = place(starts_q, tl.program_id(0) // HEADS, batch, blocks, M)
    start_q, queries = span(starts_q, sequence)
    if block * M >= queries:
        return
    start_k, keys = span(starts_k, sequence)
    dense = (start_q.to(tl.int64) * HEADS + head) * DIM
    q += start_q.to(tl.int64) * Q_TOKEN + head * Q_HEAD
    k += start_k.to(tl.int64) * K_TOKEN + head * K_HEAD
    v += start_k.to(tl.int64) * K_TOKEN + head * K_HEAD
    if bias is not None:
        bias += sequence.to(tl.int64) * bias_batch + head * bias_head
    if dbias is not None:
        dbias += (sequence.to(tl.int64) * HEADS + head) * dbias_head
    row = block * M + tl.arange(0, M)
    column = tl.arange(0, N)
    query = load_rows(q, row, queries, Q_TOKEN, DIM, D)
    do = load_rows(grad + dense, row, queries, HEADS * DIM, DIM, D)
    o = load_rows(out + dense, row, queries, HEADS * DIM, DIM, D)
    total = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    at = head * tokens + start_q + row
    tl.store(delta + at, total, mask=row < queries)
    log = tl.load(lse + at, mask=row < queries, other=float("inf")) * 1.4426950408889634
    dqs = tl.zeros([M, D], tl.float32)
    end = tl.minimum(keys, (block + 1) * M) if CAUSAL else keys
    for first in range(0, end, N):
        key = load_rows(k, first + column, keys, K_TOKEN, DIM, D)
        value = load_rows(v, first + column, keys, K_TOKEN, DIM, D)
        at_key = first + column[None, :]
        p = dot(query, tl.trans(key), tl.zeros([M, N], tl.float32), PRECISION)
        p = probabilities(
            p,
            log[:, None],
            block * M,
            row[:, None],
            at_key,
            queries,
            keys,
            bias,
            bias_query,
            scale,
            CAUSAL,
        )
        dp = dot(do, tl.trans(value), tl.zeros([M, N], tl.float32), PRECISION)
        if seed is not None:
            keep = kept(seed, start_q + block * M, head, first, threshold, HEADS, M, N)
            dp = tl.where(keep, dp, 0.0) * keep_scale
        ds = p * (dp - total[:, None])
        if dbias is not None:
            store_bias_gradient(
                dbias, ds, block * M, row[:, None], at_key, queries, keys, dbias_query
            )
        dqs = dot(ds.to(key.dtype), key, dqs, PRECISION)
    dq += start_q.to(tl.int64) * DQ_TOKEN + head * DIM
    store_rows(dq, dqs * scale, row, queries, DQ_TOKEN, DIM, D)


@jit(do_not_specialize=["batch", "tokens"])
def _keys(
    q, k, v, grad, lse, delta, dq, dk, dv, dbias, starts_q, starts_k, bias, seed,
    bias_batch, bias_head, bias_query, dbias_head, dbias_query,
    batch, tokens, blocks, scale, keep_scale, threshold,
    Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, K_TOKEN: tl.constexpr, K_HEAD: tl.constexpr,
    DQ_TOKEN: tl.constexpr, DK_TOKEN: tl.constexpr,
    HEADS: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """dK and dV of a block of N keys; dQ and the bias's gradient too where that is WHOLE sequences.

    Tiles are transposed, [N, M], so that the probabilities are the left side of dV's product.
    """
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    sequence, block = place(starts_k, tl.program_id(0) // HEADS, batch, blocks, N)
    start_q, queries = span(starts_q, sequence)
    start_k, keys = span(starts_k, sequence)
    if block * N >= (tl.maximum(keys, 1) if WHOLE else keys):  # queries without keys get zeros
        return
    dense = (start_q.to(tl.int64) * HEADS + head) * DIM
    q += start_q.to(tl.int64) * Q_TOKEN + head * Q_HEAD
    k += start_k.to(tl.int64) * K_TOKEN + head * K_HEAD
    v += start_k.to(tl.int64) * K_TOKEN + head * K_HEAD
    grad += dense
    lse += head * tokens + start_q
    if bias is not None:
        bias += sequence.to(tl.int64) * bias_batch + head * bias_head
    if WHOLE:
        dq += start_q.to(tl.int64) * DQ_TOKEN + head * DIM
        if dbias is not None:
            dbias += (sequence.to(tl.int64) * HEADS + head) * dbias_head
    else:
        delta += head * tokens + start_q
    column = block * N + tl.arange(0, N)
    key = load_rows(k, column, keys, K_TOKEN, DIM, D)
    value = load_rows(v, column, keys, K_TOKEN, DIM, D)
    dks = tl.zeros([N, D], tl.float32)
    dvs = tl.zeros([N, D], tl.float32)
    begin = block * N // M * M if CAUSAL else 0
    for first in range(begin, queries, M):
        row = first + tl.arange(0, M)
        query = load_rows(q, row, queries, Q_TOKEN, DIM, D)
        do = load_rows(grad, row, queries, HEADS * DIM, DIM, D)
        log = tl.load(lse + row, mask=row < queries, other=float("inf")) * 1.4426950408889634
        at_query, at_key = row[None, :], column[:, None]
        p = dot(key, tl.trans(query), tl.zeros([N, M], tl.float32), PRECISION)
        p = probabilities(
            p, log[None, :], first, at_query, at_key, queries, keys, bias, bias_query, scale, CAUSAL
        )
        dp = dot(value, tl.trans(do), tl.zeros([N, M], tl.float32), PRECISION)
        if seed is not None:
            keep = kept(seed, start_q + first, head, block * N, threshold, HEADS, M, N)
            keep = tl.trans(keep)
            dp = tl.where(keep, dp, 0.0) * keep_scale
            dvs = dot(tl.where(keep, p, 0.0).to(do.dtype), do, dvs, PRECISION)
        else:
            dvs = dot(p.to(do.dtype), do, dvs, PRECISION)
        if WHOLE:  # noqa: SIM108
            total = tl.sum(p * dp, 0)
        else:
            total = tl.load(delta + row, mask=row < queries, other=0.0)
        ds = p * (dp - total[None, :])
        if WHOLE and dbias is not None:
            store_bias_gradient(dbias, ds, first, at_query, at_key, queries, keys, dbias_query)
        ds = ds.to(query.dtype)
        dks = dot(ds, query, dks, PRECISION)
        if WHOLE:
            dqs = dot(tl.trans(ds), key, tl.zeros([M, D], tl.float32), PRECISION)
            store_rows(dq, dqs * scale, row, queries, DQ_TOKEN, DIM, D)
    if seed is not None:
        dvs = dvs * keep_scale
    at = start_k.to(tl.int64) * DK_TOKEN + head * DIM
    store_rows(dk + at, dks * scale, column, keys, DK_TOKEN, DIM, D)
    store_rows(dv + at, dvs, column, keys, DK_TOKEN, DIM, D)


def _run(
    grad, q, kv, dq, dkv, out, lse, starts_q, starts_k, longest_q, longest_k, scale, dropout_p,
    seed, causal, bias, need_dbias, launch,
):  # fmt: skip
    """Fills dq and dkv; -> dbias as bias, or empty."""
    q, kv = dense_last(q), dense_last(kv)
    k, v = kv.unbind(1)
    heads = q.shape[1]
    a = arguments(q, k, v, starts_q, starts_k, scale, dropout_p, seed, causal, bias)
    squares = None
    if need_dbias:  # a square per sequence and head, so that no two programs add to one place
        shape = a["batch"], heads, *bias.shape[2:]
        squares = torch.zeros(shape, dtype=torch.float32, device=q.device)
    a |= dict(
        grad=grad.contiguous(), lse=lse.contiguous(), dq=dq, DQ_TOKEN=dq.stride(0), dbias=squares
    )
    a |= dict(dbias_head=0, dbias_query=0)
    if need_dbias:
        a |= dict(dbias_head=squares.stride(1), dbias_query=squares.stride(2))
    dkv_arguments = dict(dk=dkv[:, 0], dv=dkv[:, 1], DK_TOKEN=dkv.stride(0))
    arch = launch.arch(q.device)
    tile = choose("whole", arch, q, max(longest_q, longest_k), bias)
    if tile is not None:
        a |= dkv_arguments | dict(delta=None, blocks=1, WHOLE=True)
        launch(_keys, a["batch"] * heads, tile, a)
    else:
        delta = torch.empty(lse.shape, dtype=lse.dtype, device=lse.device)
        tile = choose("queries", arch, q, longest_k, bias)
        items, blocks = work(q.shape[0], starts_q, longest_q, tile.m)
        launch(
            _queries,
            items * heads,
            tile,
            a | dict(out=out.contiguous(), delta=delta, blocks=blocks),
        )
        tile = choose("keys", arch, q, longest_q, bias)
        items, blocks = work(k.shape[0], starts_k, longest_k, tile.n)
        a |= dkv_arguments | dict(delta=delta, blocks=blocks, WHOLE=False, dbias=None)
        launch(_keys, items * heads, tile, a)
    if not need_dbias:
        return q.new_empty(0)
    return squares.sum_to_size(bias.shape).to(bias.dtype)


def backward(
    grad, qkv, out, lse, starts, longest, scale, dropout_p, seed, causal, bias, need_dbias,
    launch=launch,
):  # fmt: skip
    """The operator `attention_backward`."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    parts = qkv[:, 0], qkv[:, 1:], dqkv[:, 0], dqkv[:, 1:]
    dbias = _run(
        grad, *parts, out, lse, starts, starts, longest, longest, scale, dropout_p, seed, causal,
        bias, need_dbias, launch,
    )  # fmt: skip
    return dqkv, dbias


def cross_backward(
    grad, q, kv, out, lse, starts_q, starts_k, longest_q, longest_k, scale, dropout_p, seed,
    causal, bias, need_dbias, launch=launch,
):  # fmt: skip
    """The operator `cross_attention_backward`."""
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dkv = torch.empty(kv.shape, dtype=kv.dtype, device=kv.device)
    dbias = _run(
        grad, q, kv, dq, dkv, out, lse, starts_q, starts_k, longest_q, longest_k, scale, dropout_p,
        seed, causal, bias, need_dbias, launch,
    )  # fmt: skip
    return dq, dkv, dbias


def shipped():
    def run(launch, qkv, starts, longest, *options):
        out, lse = qkv[:, 0].contiguous(), qkv.new_empty(qkv.shape[2], qkv.shape[0]).float()
        need_dbias = options[-1] is not None
        backward(out, qkv, out, lse, starts, longest, *options, need_dbias, launch)

    yield from variants(run)
