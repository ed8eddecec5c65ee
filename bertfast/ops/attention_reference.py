"""Attention in plain PyTorch: what every backend of `attention` and `cross_attention` is held
against. It has the scores of a whole sequence in memory."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch

from .dropout import keep_mask
from .library import wide


class Options(NamedTuple):
    """Of `attention`, as in its schema; `cross_attention` has none of the last."""

    scale: float
    dropout_p: float
    seed: torch.Tensor | None
    causal: bool
    bias: torch.Tensor | None
    seqused_k: torch.Tensor | None = None
    window: int | None = None
    rel_key: torch.Tensor | None = None
    rel_query: torch.Tensor | None = None
    rel_index: torch.Tensor | None = None

    def given(self, need_dbias: bool, need_drel: bool) -> tuple[torch.Tensor | None, ...]:
        """The bias, rel_key and rel_query, None where there is no gradient to find."""
        rel = (self.rel_key, self.rel_query) if need_drel else (None, None)
        return self.bias if need_dbias else None, *rel


def _distances(s):
    """[queries, keys]: query position - key position of the scores s."""
    queries, keys = (torch.arange(n, device=s.device) for n in s.shape[1:])
    return queries[:, None] - keys


def _buckets(s, o):
    """[heads, queries, keys]: the relative embedding of each pair."""
    index = o.rel_index.long()
    return index[_distances(s) + index.shape[0] // 2].expand(s.shape)


def _relative(s, q, k, o):
    """What relative positions add to the scores s: a product of all pairs of a token and an
    embedding, of which each score takes one."""
    r, dtype = _buckets(s, o), s.dtype
    if o.rel_key is not None:
        s = s + torch.einsum("qhd,rhd->hqr", q, o.rel_key.to(dtype)).gather(2, r)
    if o.rel_query is not None:
        by_key = torch.einsum("khd,rhd->hkr", k, o.rel_query.to(dtype))
        s = s + by_key.gather(2, r.mT).mT
    return s


def scores(q: torch.Tensor, k: torch.Tensor, b: int, o: Options) -> torch.Tensor:
    """[heads, queries, keys] of sequence b."""
    s = torch.einsum("qhd,khd->hqk", q, k)
    if o.rel_index is not None:
        s = _relative(s, q, k, o)
    s = s * o.scale
    if o.bias is not None:
        s = s + o.bias[min(b, o.bias.shape[0] - 1), :, : s.shape[1], : s.shape[2]]
    if o.causal:
        s = s.masked_fill(_distances(s) < 0, -math.inf)
    if o.window is not None:
        s = s.masked_fill(_distances(s).abs() > o.window, -math.inf)
    return s


def _keep(rows, heads, keys, o):
    rows = torch.arange(*rows, device=o.seed.device) * heads
    rows = rows + torch.arange(heads, device=o.seed.device)[:, None]
    return keep_mask(o.seed, rows, keys, o.dropout_p)


def _softmax(s, lse):
    """Zeros where lse is +inf. The sum is 1 but for lse's rounding, which grows with the scores."""
    p = torch.exp(s - lse[..., None])
    total = p.sum(-1, keepdim=True)
    return p / total.masked_fill(total == 0, 1)


def _sequences(cu_q, cu_k, seqused_k):
    """(b, (first query, end), (first key, end)) of each sequence."""
    starts, ends = cu_k[:-1], cu_k[1:] if seqused_k is None else cu_k[:-1] + seqused_k
    keys = zip(starts.tolist(), ends.tolist(), strict=True)
    return enumerate(zip(pairwise(cu_q.tolist()), keys, strict=True))


def reference(
    q: torch.Tensor, kv: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, o: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [tokens_q, heads, dim], kv [tokens_k, 2, heads, dim] -> out as q, lse [heads, tokens_q]"""
    tokens, heads, _ = q.shape
    dtype = wide(q.dtype)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, tokens), dtype=dtype, device=q.device)
    for b, ((i, j), (m, n)) in _sequences(cu_q, cu_k, o.seqused_k):
        k, v = kv[m:n].to(dtype).unbind(1)
        s = scores(q[i:j].to(dtype), k, b, o)
        row = torch.logsumexp(s, -1)
        lse[:, i:j] = row.masked_fill(row == -math.inf, math.inf)  # so exp(s - lse) is 0
        p = _softmax(s, lse[:, i:j])
        if o.seed is not None:
            p = torch.where(_keep((i, j), heads, n - m, o), p / (1 - o.dropout_p), 0)
        out[i:j] = torch.einsum("hqk,khd->qhd", p, v).to(q.dtype)
    return out, lse


def empty_or_zeros(seqused_k: torch.Tensor | None) -> Callable[..., torch.Tensor]:
    """What makes dkv: a kernel writes no gradient of a key that isn't used."""
    return torch.empty if seqused_k is None else torch.zeros


def reference_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    kv: torch.Tensor,
    lse: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    o: Options,
    need_dbias: bool,
    need_drel: bool = False,
) -> tuple[torch.Tensor, ...]:
    """dq and dkv as q and kv; dbias, drel_key and drel_query as what they are of, or empty"""
    heads, dtype = q.shape[1], wide(q.dtype)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dkv = empty_or_zeros(o.seqused_k)(kv.shape, dtype=q.dtype, device=q.device)
    given = o.given(need_dbias, need_drel)
    sums = [torch.zeros(0 if t is None else t.shape, dtype=dtype, device=q.device) for t in given]
    for b, ((i, j), (m, n)) in _sequences(cu_q, cu_k, o.seqused_k):
        query, do = q[i:j].to(dtype), grad[i:j].to(dtype)
        k, v = kv[m:n].to(dtype).unbind(1)
        p = _softmax(scores(query, k, b, o), lse[:, i:j])
        dp = torch.einsum("qhd,khd->hqk", do, v)
        dropped = p
        if o.seed is not None:
            keep = _keep((i, j), heads, n - m, o)
            dp = torch.where(keep, dp / (1 - o.dropout_p), 0)
            dropped = torch.where(keep, p / (1 - o.dropout_p), 0)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        dkv[m:n, 1] = torch.einsum("hqk,qhd->khd", dropped, do).to(q.dtype)
        if need_dbias:
            target = sums[0][min(b, o.bias.shape[0] - 1), :, : j - i, : n - m]
            target += ds.sum_to_size(target.shape)
        ds = ds * o.scale
        dquery, dk = torch.einsum("hqk,khd->qhd", ds, k), torch.einsum("hqk,qhd->khd", ds, query)
        if o.rel_key is not None:
            dquery += _through(ds, _buckets(ds, o), query, o.rel_key, need_drel, sums[1])
        if o.rel_query is not None:
            dk += _through(ds.mT, _buckets(ds, o).mT, k, o.rel_query, need_drel, sums[2])
        dq[i:j], dkv[m:n, 0] = dquery.to(q.dtype), dk.to(q.dtype)
    return dq, dkv, *(d.to((q if t is None else t).dtype) for d, t in zip(sums, given, strict=True))


def _through(ds, buckets, x, rel, need_drel, drel):
    """The gradient of x in x.rel[bucket], of whose scores ds [heads, rows, columns] is; drel gains
    that of rel."""
    heads, rows, _ = ds.shape
    of = ds.new_zeros((heads, rows, rel.shape[0])).scatter_add(2, buckets, ds)
    if need_drel:
        drel += torch.einsum("hxr,xhd->rhd", of, x)
    return torch.einsum("hxr,rhd->xhd", of, rel.to(ds.dtype))
