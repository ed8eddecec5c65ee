"""Disentangled relative positions in attention's tiles (He et al., arXiv:2006.03654).

Shapes: rel_key, rel_query [buckets, HEADS, DIM], dense; rel_index int32, the bucket of each
distance, query less key position, from that of distance 0.

A tile of S queries and S keys has 2S - 1 distances, of which a query meets S in a row, one further
on than the query before it. So of the products with the first S and with the last S distances each
row takes what it meets, S values, which then only have to turn within the row. A key meets
rel_query's rows likewise, the distances falling. Nothing larger than a tile is held.
"""

import triton
import triton.language as tl

from .attention_tile import load_rows
from .dot import dot


@triton.jit
def mine(S: tl.constexpr, ROWS: tl.constexpr):
    """Which of an [S, S] tile's are products with the first S distances; see `turn`."""
    i, j = tl.arange(0, S)[:, None], tl.arange(0, S)[None, :]
    if ROWS:
        return j >= i
    else:
        return i >= j


@triton.jit
def turn(x, ROWS: tl.constexpr):
    """From distances to keys and back: within rows, value j of row i is the one at i - j - 1; or
    within columns."""
    S: tl.constexpr = x.shape[0]
    i, j = tl.arange(0, S)[:, None], tl.arange(0, S)[None, :]
    if ROWS:
        return tl.gather(x, (i - j - 1) & (S - 1), 1)
    else:
        return tl.gather(x, (j - i - 1) & (S - 1), 0)


@triton.jit
def _rows(
    rel, index, distance, longest, STEP: tl.constexpr, S: tl.constexpr,
    HEADS: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """[S, D]: rel's rows for the distances from `distance` on, STEP apart; zeros where no two
    positions are so far apart."""
    at = distance + STEP * tl.arange(0, S)
    none: tl.constexpr = 2**31 - 1
    bucket = tl.load(index + at, mask=(at < longest) & (at > -longest), other=none)
    return load_rows(rel, bucket, none, HEADS * DIM, DIM, D)


@triton.jit
def distances(
    rel, index, distance, longest, STEP: tl.constexpr, S: tl.constexpr,
    HEADS: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The first and the last S of a tile's distances, of which one is in neither; `distance` is the
    first query's less the first key's position. STEP: 1 for rel_key's rows, -1 for rel_query's."""
    near = _rows(rel, index, distance - STEP * (S - 1), longest, STEP, S, HEADS, DIM, D)
    far = _rows(rel, index, distance + STEP, longest, STEP, S, HEADS, DIM, D)
    return near, far


@triton.jit
def add_relative(s, x, near, far, ROWS: tl.constexpr, PRECISION: tl.constexpr):
    """s + x's products with the distances' rows; x [S, D] is the tile's rows, or its columns."""
    S: tl.constexpr = x.shape[0]
    zeros = tl.zeros([S, S], tl.float32)
    if ROWS:
        low = dot(x, tl.trans(near), zeros, PRECISION)
        high = dot(x, tl.trans(far), zeros, PRECISION)
    else:
        low = dot(near, tl.trans(x), zeros, PRECISION)
        high = dot(far, tl.trans(x), zeros, PRECISION)
    return s + turn(tl.where(mine(S, ROWS), low, high), ROWS)


@triton.jit
def halves(ds, dtype: tl.constexpr, ROWS: tl.constexpr):
    """ds [S, S] by the first and by the last S distances, what others have being 0."""
    ds = turn(ds, ROWS)
    first = mine(ds.shape[0], ROWS)
    return tl.where(first, ds, 0.0).to(dtype), tl.where(first, 0.0, ds).to(dtype)


@triton.jit
def relative(
    s, query, key, distance, longest, rel_key, rel_query, rel_index,
    HEADS: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """s with what there is of both; ROWS where queries are its rows, else keys."""
    S: tl.constexpr = s.shape[0]
    if rel_key is not None:
        near, far = distances(rel_key, rel_index, distance, longest, 1, S, HEADS, DIM, D)
        s = add_relative(s, query, near, far, ROWS, PRECISION)
    if rel_query is not None:
        near, far = distances(rel_query, rel_index, distance, longest, -1, S, HEADS, DIM, D)
        s = add_relative(s, key, near, far, not ROWS, PRECISION)
    return s


@triton.jit
def relative_gradient(
    dx, ds, rel, index, distance, longest, STEP: tl.constexpr,
    HEADS: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx + what `rel` gives to the rows, by the gradient ds of the products."""
    S: tl.constexpr = ds.shape[0]
    near, far = distances(rel, index, distance, longest, STEP, S, HEADS, DIM, D)
    low, high = halves(ds, near.dtype, True)
    return dot(high, far, dot(low, near, dx, PRECISION), PRECISION)
