"""softmax(Q K^T * scale + bias) V over packed sequences.

The log-sum-exp of each row is kept so that backward recomputes the probabilities instead of
storing them (Dao et al., arXiv:2205.14135).
"""

import math
from itertools import pairwise

import torch

from .declare import FLOATS, LENGTH, PROBABILITY, SEED, Number, Offsets, Tensor, UpToLengths
from .dropout import as_seed, dropout_arguments, keep_mask
from .extension import C
from .library import (
    GPU_DTYPES,
    autograd,
    cpu_limit,
    define,
    dense,
    is_bf16,
    ptr,
    register_triton,
    triton_limit,
    wide,
)
from .registry import register


def attention(
    qkv,
    cu_seqlens,
    max_seqlen,
    *,
    scale=None,
    dropout_p=0.0,
    seed=None,
    causal=False,
    bias=None,
    seqused_k=None,
):
    """Self-attention within each packed sequence, dropout on the probabilities.

    Args:
        qkv: [tokens, 3, heads, head_dim], any strides with a dense last dimension.
        cu_seqlens: int32 [batch + 1], the sequences' offsets: 0 first, tokens last.
        max_seqlen: an upper bound of the lengths.
        scale: of the scores, 1 / sqrt(head_dim) if None.
        dropout_p, seed: see `ops.dropout`; row = token * heads + head, column = key position.
        causal: a query sees the keys up to its own position.
        bias: [batch or 1, heads or 1, max_seqlen, max_seqlen], added to the scores; -inf masks.
        seqused_k: int32 [batch], how many of each sequence's tokens are keys, its first ones; None
            for all. The others are queries alone: the padding of a batch whose rows are read.

    Returns: [tokens, heads, head_dim] in qkv's dtype. A row whose keys are all masked is zeros.

    Raises: ValueError or TypeError for arguments that don't fit together.
    """
    head_dim = _ATTENTION.shape_of("qkv", qkv)[3]
    scale = default_scale(head_dim) if scale is None else float(scale)
    seed = as_seed(seed, dropout_p, qkv.device)
    return torch.ops.bertfast.attention(
        qkv, cu_seqlens, max_seqlen, scale, float(dropout_p), seed, causal, bias, seqused_k
    )[0]


def default_scale(head_dim):
    return 1 / math.sqrt(head_dim) if head_dim else 1.0


def _fake(qkv, *_):
    tokens, _, heads, head_dim = qkv.shape
    lse = qkv.new_empty((heads, tokens), dtype=wide(qkv.dtype))
    return qkv.new_empty((tokens, heads, head_dim)), lse


def _fake_backward(grad, qkv, *rest):
    *_, bias, _, need_dbias = rest
    return qkv.new_empty(qkv.shape), bias.new_empty(bias.shape) if need_dbias else qkv.new_empty(0)


_OPTIONS = (
    "Tensor cu_seqlens, SymInt max_seqlen, float scale, float dropout_p, Tensor? seed, "
    "bool causal, Tensor? bias, Tensor? seqused_k"
)
_ARGUMENTS = {
    "qkv": Tensor("tokens, 3, heads, head_dim", FLOATS),
    "cu_seqlens": Tensor("batch + 1", torch.int32, Offsets("tokens", "max_seqlen")),
    "max_seqlen": LENGTH,
    "dropout_p": PROBABILITY,
    "seed": SEED,
    "bias": Tensor("batch or 1, heads or 1, >= max_seqlen, >= max_seqlen", "as qkv or float32"),
    "seqused_k": Tensor("batch", torch.int32, UpToLengths("cu_seqlens")),
}
_OUT = Tensor("tokens, heads, head_dim", "as qkv")
_ATTENTION = define(f"attention(Tensor qkv, {_OPTIONS}) -> (Tensor, Tensor)", _fake, **_ARGUMENTS)
define(
    f"attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, {_OPTIONS}, "
    "bool need_dbias) -> (Tensor, Tensor)",
    _fake_backward,
    **_ARGUMENTS,
    grad=_OUT,
    out=_OUT,
    lse=Tensor("heads, tokens", "statistics of qkv"),
    need_dbias=Number(needs="bias"),
)


def scores(q, k, b, scale, causal, bias):
    """[heads, queries, keys] of sequence b."""
    s = torch.einsum("qhd,khd->hqk", q, k) * scale
    queries, keys = s.shape[1:]
    if bias is not None:
        s = s + bias[min(b, bias.shape[0] - 1), :, :queries, :keys]
    if causal:
        later = torch.ones(queries, keys, dtype=torch.bool, device=s.device).triu(1)
        s = s.masked_fill(later, -math.inf)
    return s


def _keep(seed, rows, heads, keys, dropout_p):
    rows = torch.arange(*rows, device=seed.device) * heads
    rows = rows + torch.arange(heads, device=seed.device)[:, None]
    return keep_mask(seed, rows, keys, dropout_p)


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


def reference(q, kv, cu_q, cu_k, scale, dropout_p, seed, causal, bias, seqused_k=None):
    """q [tokens_q, heads, dim], kv [tokens_k, 2, heads, dim] -> out as q, lse [heads, tokens_q]"""
    tokens, heads, _ = q.shape
    dtype = wide(q.dtype)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, tokens), dtype=dtype, device=q.device)
    for b, ((i, j), (m, n)) in _sequences(cu_q, cu_k, seqused_k):
        k, v = kv[m:n].to(dtype).unbind(1)
        s = scores(q[i:j].to(dtype), k, b, scale, causal, bias)
        row = torch.logsumexp(s, -1)
        lse[:, i:j] = row.masked_fill(row == -math.inf, math.inf)  # so exp(s - lse) is 0
        p = _softmax(s, lse[:, i:j])
        if seed is not None:
            p = torch.where(_keep(seed, (i, j), heads, n - m, dropout_p), p / (1 - dropout_p), 0)
        out[i:j] = torch.einsum("hqk,khd->qhd", p, v).to(q.dtype)
    return out, lse


def empty_or_zeros(seqused_k):
    """What makes dkv: a kernel writes no gradient of a key that isn't used."""
    return torch.empty if seqused_k is None else torch.zeros


def reference_backward(
    grad, q, kv, lse, cu_q, cu_k, scale, dropout_p, seed, causal, bias, seqused_k, need_dbias
):
    """dq and dkv as q and kv, dbias as bias or empty"""
    heads, dtype = q.shape[1], wide(q.dtype)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dkv = empty_or_zeros(seqused_k)(kv.shape, dtype=q.dtype, device=q.device)
    dbias = torch.zeros(bias.shape, dtype=dtype, device=q.device) if need_dbias else None
    for b, ((i, j), (m, n)) in _sequences(cu_q, cu_k, seqused_k):
        query, do = q[i:j].to(dtype), grad[i:j].to(dtype)
        k, v = kv[m:n].to(dtype).unbind(1)
        p = _softmax(scores(query, k, b, scale, causal, bias), lse[:, i:j])
        dp = torch.einsum("qhd,khd->hqk", do, v)
        dropped = p
        if seed is not None:
            keep = _keep(seed, (i, j), heads, n - m, dropout_p)
            dp = torch.where(keep, dp / (1 - dropout_p), 0)
            dropped = torch.where(keep, p / (1 - dropout_p), 0)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        dq[i:j] = (torch.einsum("hqk,khd->qhd", ds, k) * scale).to(q.dtype)
        dkv[m:n, 0] = (torch.einsum("hqk,qhd->khd", ds, query) * scale).to(q.dtype)
        dkv[m:n, 1] = torch.einsum("hqk,qhd->khd", dropped, do).to(q.dtype)
        if need_dbias:
            target = dbias[min(b, bias.shape[0] - 1), :, : j - i, : n - m]
            target += ds.sum_to_size(target.shape)
    return dq, dkv, dbias.to(bias.dtype) if need_dbias else q.new_empty(0)


@register("attention", "reference")
def _reference(qkv, cu_seqlens, max_seqlen, *options):
    return reference(qkv[:, 0], qkv[:, 1:], cu_seqlens, cu_seqlens, *options)


@register("attention_backward", "reference")
def _reference_backward(grad, qkv, out, lse, cu_seqlens, max_seqlen, *options):
    dq, dkv, dbias = reference_backward(
        *(grad, qkv[:, 0], qkv[:, 1:], lse, cu_seqlens, cu_seqlens), *options
    )
    return torch.cat([dq.unsqueeze(1), dkv], 1), dbias


def dense_last(t):
    return t if t.stride(-1) == 1 else t.contiguous()


def bias_arguments(bias):
    """What C++'s Bias takes: pointer, the batch, head and query strides (0 where broadcast), and
    dtype."""
    if bias is None:
        return 0, 0, 0, 0, 0
    steps = [0 if n == 1 else s for n, s in zip(bias.shape[:2], bias.stride(), strict=False)]
    return ptr(bias), *steps, bias.stride(2), GPU_DTYPES.index(bias.dtype)


def _cpu_arguments(q, kv, starts_q, starts_k, scale, dropout_p, seed, causal, bias, seqused_k):
    tokens, heads, dim = q.shape
    return (
        *(ptr(q), ptr(kv[:, 0]), ptr(kv[:, 1])),
        *(*q.stride()[:2], kv.stride(0), kv.stride(2), ptr(starts_q), ptr(starts_k)),
        ptr(seqused_k),
        *(starts_q.shape[0] - 1, tokens, heads, dim, scale, bias_arguments(bias)),
        *(dropout_arguments(dropout_p, seed), causal, is_bf16(q)),
    )


def cpu(q, kv, starts_q, starts_k, scale, dropout_p, seed, causal, bias, seqused_k=None):
    """As `reference`."""
    starts_q, starts_k, seed = dense(starts_q), dense(starts_k), dense(seed)
    q, kv, bias = dense_last(q), dense_last(kv), None if bias is None else dense_last(bias)
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty((q.shape[1], q.shape[0]))
    options = scale, dropout_p, seed, causal, bias, dense(seqused_k)
    C.attention(*_cpu_arguments(q, kv, starts_q, starts_k, *options), ptr(out), ptr(lse))
    return out, lse


def cpu_backward(
    grad, q, kv, lse, starts_q, starts_k, scale, dropout_p, seed, causal, bias, seqused_k,
    need_dbias, dq, dkv,
):  # fmt: skip
    """Fills dq and dkv, whose heads are dense; -> dbias as bias, or empty."""
    grad, lse, starts_q, starts_k, seed = map(dense, (grad, lse, starts_q, starts_k, seed))
    q, kv, bias = dense_last(q), dense_last(kv), None if bias is None else dense_last(bias)
    # One full square per sequence and head, so that no two threads add to one place.
    rows, columns = bias.shape[2:] if need_dbias else (0, 0)
    dbias = None
    if need_dbias:
        dbias = torch.zeros((starts_q.shape[0] - 1, q.shape[1], rows, columns))
    options = scale, dropout_p, seed, causal, bias, dense(seqused_k)
    C.attention_backward(
        *_cpu_arguments(q, kv, starts_q, starts_k, *options),
        *(ptr(grad), ptr(lse), ptr(dq), ptr(dkv[:, 0]), ptr(dkv[:, 1])),
        *(dq.stride(0), dkv.stride(0), ptr(dbias), rows, columns),
    )
    return dbias.sum_to_size(bias.shape).to(bias.dtype) if need_dbias else q.new_empty(0)


@register("attention", "cpu", limit=cpu_limit)
def _cpu(qkv, cu_seqlens, max_seqlen, *options):
    return cpu(qkv[:, 0], qkv[:, 1:], cu_seqlens, cu_seqlens, *options)


@register("attention_backward", "cpu", limit=cpu_limit)
def _cpu_backward(grad, qkv, out, lse, cu_seqlens, max_seqlen, *options):
    dqkv = empty_or_zeros(options[-2])(qkv.shape, dtype=qkv.dtype)
    dbias = cpu_backward(
        *(grad, qkv[:, 0], qkv[:, 1:], lse, cu_seqlens, cu_seqlens, *options),
        *(dqkv[:, 0], dqkv[:, 1:]),
    )
    return dqkv, dbias


def _setup(ctx, inputs, output):
    qkv, cu_seqlens, *ctx.options, seed, ctx.causal, bias, seqused_k = inputs
    ctx.save_for_backward(qkv, *output, cu_seqlens, seed, bias, seqused_k)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 9
    *tensors, seed, bias, seqused_k = ctx.saved_tensors
    need_dbias = ctx.needs_input_grad[7]
    dqkv, dbias = torch.ops.bertfast.attention_backward(
        grad, *tensors, *ctx.options, seed, ctx.causal, bias, seqused_k, need_dbias
    )
    return dqkv, *(None,) * 6, dbias if need_dbias else None, None


autograd("attention", _backward, _setup)


def triton_attention_limit(device, dtype, arguments):
    head_dim = arguments[0].shape[-1] if arguments else 0
    if head_dim > 128:
        return f"head_dim is {head_dim}, it takes up to 128"
    return triton_limit(device, dtype, arguments)


register_triton("attention", "attention.forward", triton_attention_limit)
register_triton("attention_backward", "attention_backward.backward", triton_attention_limit)
