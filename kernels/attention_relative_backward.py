"""Gradients of attention's relative positions; shapes as in attention_relative.py.

No atomics: a program sums what a diagonal of tiles gives to its distances, a second kernel what the
distances give to their buckets, each in a fixed order.
"""

import torch
import triton
import triton.language as tl

from .attention_launch import BUCKETS, choose
from .attention_relative import add_relative, distances, halves
from .attention_tile import _LOG2E, kept, load_rows, scores, span, store_rows, words_offset
from .dot import dot
from .jit import cdiv, jit
from .rows import programs


@triton.jit
def _diagonal(i):
    """0, -1, 1, -2, 2, ...: those with most tiles begin first."""
    return (i + 1) // 2 * (1 - i % 2 * 2)


@jit(do_not_specialize=["batch", "tokens", "longest", "diagonals", "parts"])
def _distances(
    q, k, v, grad, lse, delta, key_sums, query_sums, starts_q, starts_k, seqused_k, bias, seed,
    rel_key, rel_query, rel_index, window, bias_batch, bias_head, bias_query,
    batch, tokens, longest, diagonals, parts, scale, keep_scale, threshold,
    Q_TOKEN: tl.constexpr, Q_HEAD: tl.constexpr, K_TOKEN: tl.constexpr, K_HEAD: tl.constexpr,
    HEADS: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Sums for rel_key's and rel_query's gradients, [parts, diagonals, 2 M, HEADS, DIM].

    A program is one diagonal of tiles, which all have the same distances, of one head and of every
    sequence of a part.
    """
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    item = tl.program_id(0) // HEADS
    diagonal = _diagonal(item % diagonals)
    step: tl.constexpr = HEADS * DIM
    if rel_key is not None:
        near_key, far_key = distances(
            rel_key + head * DIM, rel_index, diagonal * M, longest, 1, M, HEADS, DIM, D
        )
        dnear_key = tl.zeros([M, D], tl.float32)
        dfar_key = tl.zeros([M, D], tl.float32)
    if rel_query is not None:
        near_query, far_query = distances(
            rel_query + head * DIM, rel_index, diagonal * M, longest, -1, M, HEADS, DIM, D
        )
        dnear_query = tl.zeros([M, D], tl.float32)
        dfar_query = tl.zeros([M, D], tl.float32)
    offset = None if seed is None else words_offset(seed, M, N)
    for sequence in range(item // diagonals, batch, parts):
        start, queries = span(starts_q, sequence)
        start_k, keys = span(starts_k, sequence, seqused_k)
        begin = tl.maximum(diagonal, 0)
        end = tl.minimum(tl.cdiv(queries, M), tl.cdiv(keys, M) + diagonal)
        for block in range(begin, end):
            first, at = block * M, (block - diagonal) * M
            row, column = first + tl.arange(0, M), at + tl.arange(0, N)
            if seed is not None:
                keep = kept(seed, offset, start + first, head, at, threshold, HEADS, M, N)
            place_k = start_k.to(tl.int64) * K_TOKEN + head * K_HEAD
            place_q = start.to(tl.int64) * Q_TOKEN + head * Q_HEAD
            query = load_rows(q + place_q, row, queries, Q_TOKEN, DIM, D)
            key = load_rows(k + place_k, column, keys, K_TOKEN, DIM, D)
            s = dot(query, tl.trans(key), tl.zeros([M, N], tl.float32), PRECISION)
            if rel_key is not None:
                s = add_relative(s, query, near_key, far_key, True, PRECISION)
            if rel_query is not None:
                s = add_relative(s, key, near_query, far_query, False, PRECISION)
            square_bias = bias
            if bias is not None:
                square_bias = bias + tl.cast(sequence, tl.int64) * bias_batch + head * bias_head
            s = scores(
                s, first, row[:, None], column[None, :], queries, keys, square_bias, bias_query,
                scale, window, CAUSAL,
            )  # fmt: skip
            at_row = head * tokens + start + row
            log = tl.load(lse + at_row, mask=row < queries, other=float("inf")) * _LOG2E
            total = tl.load(delta + at_row, mask=row < queries, other=0.0)
            p = tl.exp2(s - log[:, None])
            value = load_rows(v + place_k, column, keys, K_TOKEN, DIM, D)
            do = load_rows(
                grad + (start.to(tl.int64) * HEADS + head) * DIM, row, queries, step, DIM, D
            )
            dp = dot(do, tl.trans(value), tl.zeros([M, N], tl.float32), PRECISION)
            if seed is not None:
                dp = tl.where(keep, dp, 0.0) * keep_scale
            ds = p * (dp - total[:, None])
            if rel_key is not None:
                low, high = halves(ds, query.dtype, True)
                dnear_key = dot(tl.trans(low), query, dnear_key, PRECISION)
                dfar_key = dot(tl.trans(high), query, dfar_key, PRECISION)
            if rel_query is not None:
                low, high = halves(ds, query.dtype, False)
                dnear_query = dot(low, key, dnear_query, PRECISION)
                dfar_query = dot(high, key, dfar_query, PRECISION)
    place = item.to(tl.int64) * (2 * M * step) + head * DIM
    slot = tl.arange(0, M)
    if rel_key is not None:
        store_rows(key_sums + place, dnear_key, slot, 2 * M, step, DIM, D)
        store_rows(key_sums + place, dfar_key, M + slot, 2 * M, step, DIM, D)
    if rel_query is not None:
        store_rows(query_sums + place, dnear_query, slot, 2 * M, step, DIM, D)
        store_rows(query_sums + place, dfar_query, M + slot, 2 * M, step, DIM, D)


@jit(do_not_specialize=["longest", "diagonals", "parts", "buckets"])
def _buckets(
    sums, drel, rel_index, longest, diagonals, parts, buckets, scale,
    STEP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr,
    RUN: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """drel [buckets, HEADS, DIM] from sums [parts, diagonals, RUN, HEADS, DIM]: a program has M
    buckets of a head, and reads N distances at a time, where any of them is one of its buckets'."""
    head = tl.program_id(0) % HEADS
    bucket = tl.program_id(0) // HEADS * M + tl.arange(0, M)
    total = tl.zeros([M, D], tl.float32)
    for first in range(0, diagonals * RUN, N):
        slot = first + tl.arange(0, N)
        distance = _diagonal(slot // RUN) * (RUN // 2) + STEP * (slot % RUN - (RUN // 2 - 1))
        there = (slot % RUN < RUN - 1) & (distance < longest) & (distance > -longest)
        found = tl.load(rel_index + distance, mask=there, other=-1)
        ours = (found[None, :] == bucket[:, None]).to(tl.float32)
        if tl.max(ours) > 0:
            for part in range(parts):
                base = sums + (tl.cast(part, tl.int64) * diagonals * RUN * HEADS + head) * DIM
                x = load_rows(base, slot, diagonals * RUN, HEADS * DIM, DIM, D)
                total = dot(ours, x, total, "ieee")
    store_rows(drel + head * DIM, total * scale, bucket, buckets, HEADS * DIM, DIM, D)


def relative_gradients(a, longest, window, launch):
    """drel_key and drel_query, empty for what there isn't; `a` as for attention's other kernels,
    `delta` filled."""
    q, heads, dim = a["q"], a["HEADS"], a["DIM"]
    tile = choose("distances relative", launch.arch(q.device), q, longest, None)
    reach = cdiv(longest, tile.m) - 1
    if window is not None:
        reach = min(reach, cdiv(window, tile.m))
    diagonals = 2 * max(reach, 0) + 1
    parts = max(1, min(a["batch"], cdiv(programs(q.device, 4), heads * diagonals)))
    shape = parts, diagonals, 2 * tile.m, heads, dim
    rels = a["rel_key"], a["rel_query"]
    sums = [None if r is None else torch.empty(shape, device=q.device) for r in rels]
    a = a | dict(longest=longest, diagonals=diagonals, parts=parts)
    a |= dict(key_sums=sums[0], query_sums=sums[1])
    launch(_distances, parts * diagonals * heads, tile, a)
    drels = []
    for rel, of_distances, step in zip(rels, sums, (1, -1), strict=True):
        drels.append(q.new_empty(0) if rel is None else torch.empty_like(rel))
        if rel is not None:
            b = dict(sums=of_distances, drel=drels[-1], buckets=len(rel), STEP=step)
            b |= dict(RUN=2 * tile.m)
            launch(_buckets, cdiv(len(rel), BUCKETS.m) * heads, BUCKETS, a | b)
    return drels
