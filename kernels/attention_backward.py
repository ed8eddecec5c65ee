"""Attention over packed sequences, backward; shapes as in attention.py.

Probabilities are recomputed from the log-sum-exp (Dao et al., arXiv:2205.14135). No atomics: each
gradient is summed by one program in a fixed order, so that it is the same bits every time. Short
sequences take one kernel, where a program holds all keys of a head; else one for dQ, then one for
dK and dV.
"""

import torch
import triton
import triton.language as tl

from ..ops.attention_reference import empty_or_zeros
from .attention_launch import (
    arguments,
    bounded,
    choose,
    dense_last,
    launch,
    variants,
    work,
)
from .attention_relative import relative, relative_gradient
from .attention_relative_backward import relative_gradients
from .attention_tile import (
    _LOG2E,
    kept,
    load_rows,
    near,
    place,
    scores,
    span,
    square,
    store_rows,
    words_offset,
)
from .dot import dot
from .jit import jit


@triton.jit
def store_bias_gradient(dbias, ds, row, query, key, queries, keys, dbias_query):
    at = square(dbias, row, query, key, dbias_query)
    tl.store(at, ds, mask=(query < queries) & (key < keys))


@triton.jit
def _step(
    dqs, query, do, log, total, k, v, row, first, end, queries, keys, start_q, head,
    bias, bias_query, dbias, dbias_query, seed, offset, rel_key, rel_query, rel_index, window,
    scale, keep_scale, threshold,
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
        value = load_rows(v, at + column, keys, K_TOKEN, DIM, D, FULL)
        at_key = at + column[None, :]
        p = dot(query, tl.trans(key), tl.zeros([M, N], tl.float32), PRECISION)
        if FULL:
            p = tl.exp2(p * (scale * _LOG2E) - log[:, None])
        else:
            p = relative(
                p, query, key, row - at, queries, rel_key, rel_query, rel_index,
                HEADS, DIM, D, True, PRECISION,
            )  # fmt: skip
            p = scores(
                p, row, at_query, at_key, queries, keys, bias, bias_query, scale, window, CAUSAL
            )
            p = tl.exp2(p - log[:, None])
        dp = dot(do, tl.trans(value), tl.zeros([M, N], tl.float32), PRECISION)
        if seed is not None:
            dp = tl.where(keep, dp, 0.0) * keep_scale
        ds = p * (dp - total[:, None])
        if dbias is not None:
            store_bias_gradient(dbias, ds, row, at_query, at_key, queries, keys, dbias_query)
        dqs = dot(ds.to(key.dtype), key, dqs, PRECISION)
        if rel_key is not None:
            dqs = relative_gradient(
                dqs, ds, rel_key, rel_index, row - at, queries, 1, HEADS, DIM, D, PRECISION
            )
    return dqs


@jit(do_not_specialize=["batch", "tokens"])
def _queries(
    q, k, v, out, grad, lse, delta, dq, dbias, starts_q, starts_k, seqused_k, bias, seed,
    rel_key, rel_query, rel_index, window,
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
    start_k, keys = span(starts_k, sequence, seqused_k)
    dense = (start_q.to(tl.int64) * HEADS + head) * DIM
    q += start_q.to(tl.int64) * Q_TOKEN + head * Q_HEAD
    k += start_k.to(tl.int64) * K_TOKEN + head * K_HEAD
    v += start_k.to(tl.int64) * K_TOKEN + head * K_HEAD
    if bias is not None:
        bias += sequence.to(tl.int64) * bias_batch + head * bias_head
    if rel_key is not None:
        rel_key += head * DIM
    if rel_query is not None:
        rel_query += head * DIM
    if dbias is not None:
        dbias += (sequence.to(tl.int64) * HEADS + head) * dbias_head
    row = block * M + tl.arange(0, M)
    query = load_rows(q, row, queries, Q_TOKEN, DIM, D)
    do = load_rows(grad + dense, row, queries, HEADS * DIM, DIM, D)
    o = load_rows(out + dense, row, queries, HEADS * DIM, DIM, D)
    total = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    at = head * tokens + start_q + row
    tl.store(delta + at, total, mask=row < queries)
    log = tl.load(lse + at, mask=row < queries, other=float("inf")) * _LOG2E
    dqs = tl.zeros([M, D], tl.float32)
    offset = None if seed is None else words_offset(seed, M, N)
    end = tl.minimum(keys, (block + 1) * M) if CAUSAL else keys
    first = 0
    if window is not None:
        first, end = near(first, end, block * M, window, M, N)
    PLAIN: tl.constexpr = bias is None and window is None and rel_index is None
    PEEL: tl.constexpr = PLAIN and not CAUSAL and q.dtype.element_ty != tl.float32
    if PEEL:  # all but the last tile; fp32 would spill
        first = keys // N * N
        dqs = _step(
            dqs, query, do, log, total, k, v, block * M, 0, first, queries, keys, start_q, head,
            bias, bias_query, dbias, dbias_query, seed, offset, rel_key, rel_query, rel_index,
            window, scale, keep_scale, threshold,
            K_TOKEN, HEADS, DIM, D, CAUSAL, PRECISION, M, N, True,
        )  # fmt: skip
    dqs = _step(
        dqs, query, do, log, total, k, v, block * M, first, end, queries, keys, start_q, head,
        bias, bias_query, dbias, dbias_query, seed, offset, rel_key, rel_query, rel_index, window,
        scale, keep_scale, threshold,
        K_TOKEN, HEADS, DIM, D, CAUSAL, PRECISION, M, N, False,
    )  # fmt: skip
    dq += start_q.to(tl.int64) * DQ_TOKEN + head * DIM
    store_rows(dq, dqs * scale, row, queries, DQ_TOKEN, DIM, D)


@triton.jit
def load_row(base, row, rows, other, FULL: tl.constexpr):
    if FULL:
        return tl.load(base + row)
    else:
        return tl.load(base + row, mask=row < rows, other=other)


@triton.jit
def _key_step(
    dks, dvs, key, value, q, grad, out, lse, delta, dq, dbias, dbias_query, begin, end, at,
    queries, keys, start_q, head, bias, bias_query, seed, offset,
    rel_key, rel_query, rel_index, window, scale, keep_scale, threshold,
    Q_TOKEN: tl.constexpr, DQ_TOKEN: tl.constexpr,
    HEADS: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    WHOLE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Adds the tiles of queries from `begin` to `end`; FULL tiles need no mask of queries."""
    column = at + tl.arange(0, N)
    zero = tl.minimum(keep_scale, 0.0)  # not a constant: see attention.py
    for first in range(begin, end, M):
        row = first + tl.arange(0, M)
        if seed is not None:
            keep = kept(seed, offset, start_q + first, head, at, threshold, HEADS, M, N, True)
        query = load_rows(q, row, queries, Q_TOKEN, DIM, D, FULL)
        do = load_rows(grad, row, queries, HEADS * DIM, DIM, D, FULL)
        log = load_row(lse, row, queries, float("inf"), FULL) * _LOG2E
        at_query, at_key = row[None, :], column[:, None]
        p = dot(key, tl.trans(query), tl.zeros([N, M], tl.float32), PRECISION)
        if WHOLE or CAUSAL or bias is not None or window is not None or rel_index is not None:
            p = relative(
                p, query, key, first - at, queries, rel_key, rel_query, rel_index,
                HEADS, DIM, D, False, PRECISION,
            )  # fmt: skip
            p = scores(
                p, first, at_query, at_key, queries, keys, bias, bias_query, scale, window, CAUSAL
            )
            p = tl.exp2(p - log[None, :])
        else:  # rows past the keys come to nothing: they are neither stored nor added to others
            p = tl.exp2(p * (scale * _LOG2E) - log[None, :])
        dp = dot(value, tl.trans(do), tl.zeros([N, M], tl.float32), PRECISION)
        if seed is not None:
            dp = tl.where(keep, dp, 0.0) * keep_scale
            dvs = dot(tl.where(keep, p, zero).to(do.dtype), do, dvs, PRECISION)
        else:
            dvs = dot(p.to(do.dtype), do, dvs, PRECISION)
        if WHOLE:
            o = load_rows(out, row, queries, HEADS * DIM, DIM, D, FULL)
            total = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
        else:
            total = load_row(delta, row, queries, 0.0, FULL)
        ds = p * (dp - total[None, :])
        if WHOLE and dbias is not None:
            store_bias_gradient(dbias, ds, first, at_query, at_key, queries, keys, dbias_query)
        if rel_query is not None:
            dks = relative_gradient(
                dks, ds, rel_query, rel_index, first - at, queries, -1, HEADS, DIM, D, PRECISION
            )
        ds = ds.to(query.dtype)
        dks = dot(ds, query, dks, PRECISION)
        if WHOLE:
            dqs = dot(tl.trans(ds), key, tl.zeros([M, D], tl.float32), PRECISION)
            store_rows(dq, dqs * scale, row, queries, DQ_TOKEN, DIM, D)
    return dks, dvs


@jit(do_not_specialize=["batch", "tokens"])
def _keys(
    q, k, v, out, grad, lse, delta, dq, dk, dv, dbias, starts_q, starts_k, seqused_k, bias,
    seed, rel_key, rel_query, rel_index, window,
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
    start_k, keys = span(starts_k, sequence, seqused_k)
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
    if rel_key is not None:
        rel_key += head * DIM
    if rel_query is not None:
        rel_query += head * DIM
    if WHOLE:
        out += dense
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
    offset = None if seed is None else words_offset(seed, M, N, True)
    begin = block * N // M * M if CAUSAL else 0
    end = queries
    if window is not None:
        begin, end = near(begin, end, block * N, window, N, M)
    PLAIN: tl.constexpr = bias is None and window is None and rel_index is None
    PEEL: tl.constexpr = PLAIN and not CAUSAL and q.dtype.element_ty != tl.float32
    if PEEL:
        begin = queries // M * M
        dks, dvs = _key_step(
            dks, dvs, key, value, q, grad, out, lse, delta, dq, dbias, dbias_query, 0, begin,
            block * N, queries, keys, start_q, head, bias, bias_query, seed, offset,
            rel_key, rel_query, rel_index, window, scale, keep_scale, threshold,
            Q_TOKEN, DQ_TOKEN, HEADS, DIM, D, CAUSAL, PRECISION, M, N, WHOLE, True,
        )  # fmt: skip
    dks, dvs = _key_step(
        dks, dvs, key, value, q, grad, out, lse, delta, dq, dbias, dbias_query, begin, end,
        block * N, queries, keys, start_q, head, bias, bias_query, seed, offset,
        rel_key, rel_query, rel_index, window, scale, keep_scale, threshold,
        Q_TOKEN, DQ_TOKEN, HEADS, DIM, D, CAUSAL, PRECISION, M, N, WHOLE, False,
    )  # fmt: skip
    if seed is not None:
        dvs = dvs * keep_scale
    at = start_k.to(tl.int64) * DK_TOKEN + head * DIM
    store_rows(dk + at, dks * scale, column, keys, DK_TOKEN, DIM, D)
    store_rows(dv + at, dvs, column, keys, DK_TOKEN, DIM, D)


def _run(
    grad, q, kv, dq, dkv, out, lse, starts_q, starts_k, longest_q, longest_k, scale, dropout_p,
    seed, causal, bias, seqused_k, window, rel_key, rel_query, rel_index, need_dbias, need_drel,
    launch,
):  # fmt: skip
    """Fills dq and dkv; -> dbias as bias, drel_key and drel_query as they are, or empty."""
    q, kv = dense_last(q), dense_last(kv)
    k, v = kv.unbind(1)
    heads = q.shape[1]
    window = bounded(window, longest_k)
    a = arguments(
        q, k, v, starts_q, starts_k, scale, dropout_p, seed, causal, bias, seqused_k, window,
        rel_key, rel_query, rel_index,
    )  # fmt: skip
    drels = q.new_empty(0), q.new_empty(0)
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
    kind, tile = "" if rel_index is None else " relative", None
    if not kind:
        tile = choose("whole", arch, q, max(longest_q, longest_k), bias)
    if tile is not None:
        a |= dkv_arguments | dict(out=out.contiguous(), delta=None, blocks=1, WHOLE=True)
        launch(_keys, a["batch"] * heads, tile, a)
    else:
        delta = torch.empty(lse.shape, dtype=lse.dtype, device=lse.device)
        tile = choose(f"queries{kind}", arch, q, longest_k, bias, window)
        items, blocks = work(q.shape[0], starts_q, longest_q, tile.m)
        launch(
            _queries,
            items * heads,
            tile,
            a | dict(out=out.contiguous(), delta=delta, blocks=blocks),
        )
        tile = choose(f"keys{kind}", arch, q, longest_q, bias, window)
        items, blocks = work(k.shape[0], starts_k, longest_k, tile.n)
        a |= dkv_arguments | dict(out=None, delta=delta, blocks=blocks, WHOLE=False, dbias=None)
        launch(_keys, items * heads, tile, a)
        if need_drel:
            drels = relative_gradients(a, longest_q, window, launch)
    if not need_dbias:
        return q.new_empty(0), *drels
    return squares.sum_to_size(bias.shape).to(bias.dtype), *drels


def backward(
    grad, qkv, out, lse, starts, longest, scale, dropout_p, seed, causal, bias, seqused_k,
    window, rel_key, rel_query, rel_index, need_dbias, need_drel, launch=launch,
):  # fmt: skip
    """The operator `attention_backward`."""
    dqkv = empty_or_zeros(seqused_k)(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    parts = qkv[:, 0], qkv[:, 1:], dqkv[:, 0], dqkv[:, 1:]
    others = _run(
        grad, *parts, out, lse, starts, starts, longest, longest, scale, dropout_p, seed, causal,
        bias, seqused_k, window, rel_key, rel_query, rel_index, need_dbias, need_drel, launch,
    )  # fmt: skip
    return dqkv, *others


def cross_backward(
    grad, q, kv, out, lse, starts_q, starts_k, longest_q, longest_k, scale, dropout_p, seed,
    causal, bias, need_dbias, launch=launch,
):  # fmt: skip
    """The operator `cross_attention_backward`."""
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dkv = torch.empty(kv.shape, dtype=kv.dtype, device=kv.device)
    dbias, *_ = _run(
        grad, q, kv, dq, dkv, out, lse, starts_q, starts_k, longest_q, longest_k, scale, dropout_p,
        seed, causal, bias, *(None,) * 5, need_dbias, False, launch,
    )  # fmt: skip
    return dq, dkv, dbias


def shipped():
    def run(launch, qkv, starts, longest, *options):
        out, lse = qkv[:, 0].contiguous(), qkv.new_empty(qkv.shape[2], qkv.shape[0]).float()
        needs = options[4] is not None, options[-1] is not None
        backward(out, qkv, out, lse, starts, longest, *options, *needs, launch)

    yield from variants(run)
