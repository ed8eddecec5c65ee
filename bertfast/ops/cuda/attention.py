"""Attention and cross-attention on csrc/cuda/attention.cu: tensor cores, head dims to 128."""

import torch
from torch.nn import functional as F

from ..attention import bias_arguments, dense_last, full_and_plain
from ..attention_reference import empty_or_zeros
from ..dropout import dropout_arguments
from ..extension import C
from ..library import cuda_float_limit, cuda_queue, dense, ptr
from ..registry import register
from .arguments import dtype_code

HEAD_DIMS = (32, 64, 128)  # others are padded with zeros to the next


def _limit(device, dtype, arguments):
    head_dim = arguments[0].shape[-1] if arguments else 0  # qkv's or q's, in backward grad's
    if head_dim > HEAD_DIMS[-1]:
        return f"head_dim is {head_dim}, it takes at most {HEAD_DIMS[-1]}"
    return cuda_float_limit(device, dtype, arguments)


def _head_dim(dim):
    return next(d for d in HEAD_DIMS if d >= dim)


def _padded(t):
    """t with zeros up to the head dimension that kernels have."""
    extra = _head_dim(t.shape[-1]) - t.shape[-1]
    return F.pad(t, (0, extra)) if extra else t


def _aligned(x):
    """x as it is where the kernel can read it by 16 bytes, else a copy."""
    t = _padded(x)
    rows = all(s * t.element_size() % 16 == 0 for s in t.stride()[:-1])
    if t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and rows:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _arguments(
    q, kv, starts_q, starts_k, longest_q, longest_k, scale, dropout_p, seed, causal, bias, seqused_k
):
    tokens, heads, head_dim = q.shape
    pointer, batch, head, query, _ = bias_arguments(bias)
    return (
        *(dtype_code(q), ptr(q), ptr(kv), *q.stride()[:2], *kv.stride()[:3]),
        *(ptr(starts_q), ptr(starts_k), ptr(seqused_k)),
        *(starts_q.shape[0] - 1, tokens, heads, head_dim, longest_q, longest_k, scale, pointer),
        *(bias is not None and bias.dtype == torch.float32, batch, head, query),
        *(*dropout_arguments(dropout_p, seed), causal),
    )


def _attend(
    q, kv, starts_q, starts_k, longest_q, longest_k, scale, dropout_p, seed, causal, bias,
    seqused_k=None,
):  # fmt: skip
    """-> out as q, lse [heads, tokens_q]"""
    head_dim = q.shape[2]
    starts_q, starts_k, seed = dense(starts_q), dense(starts_k), dense(seed)
    q, kv, bias = _aligned(q), _aligned(kv), None if bias is None else dense_last(bias)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[1], q.shape[0]), device=q.device)
    options = longest_q, longest_k, scale, dropout_p, seed, causal, bias, dense(seqused_k)
    C.cuda_attention(
        *_arguments(q, kv, starts_q, starts_k, *options), ptr(out), ptr(lse), *cuda_queue(q)
    )
    return out[..., :head_dim].contiguous(), lse


def _gradients(
    grad, q, kv, out, lse, starts_q, starts_k, longest_q, longest_k, scale, dropout_p, seed, causal,
    bias, seqused_k, need_dbias, dq, dkv,
):  # fmt: skip
    """Fills dq and dkv, padded and with dense tokens; -> dbias as bias, or empty."""
    starts_q, starts_k, seed, lse = map(dense, (starts_q, starts_k, seed, lse))
    q, kv, bias = _aligned(q), _aligned(kv), None if bias is None else dense_last(bias)
    grad, out = _aligned(grad.contiguous()), _aligned(out.contiguous())
    delta = torch.empty(lse.shape, device=q.device)
    dbias, rows, columns = None, 0, 0
    if need_dbias:
        # One full square per sequence and head, so that no two thread blocks add to one place.
        rows, columns = bias.shape[2:]
        shape = starts_q.shape[0] - 1, q.shape[1], rows, columns
        dbias = torch.zeros(shape, device=q.device)
    options = longest_q, longest_k, scale, dropout_p, seed, causal, bias, dense(seqused_k)
    C.cuda_attention_backward(
        *_arguments(q, kv, starts_q, starts_k, *options),
        *(ptr(grad), ptr(out), ptr(lse), ptr(delta), ptr(dq), ptr(dkv)),
        *(dq.stride(0), dkv.stride(0), ptr(dbias), rows, columns, *cuda_queue(q)),
    )
    if not need_dbias:
        return torch.empty(0, dtype=q.dtype, device=q.device)
    return dbias.sum_to_size(bias.shape).to(bias.dtype)


def _padded_empty(x, empty=torch.empty):
    """An output of x's shape, but for the head dimension that kernels have."""
    return empty((*x.shape[:-1], _head_dim(x.shape[-1])), dtype=x.dtype, device=x.device)


@register("attention", "cuda", limit=full_and_plain("attention", _limit))
def _forward(qkv, cu_seqlens, max_seqlen, *options):
    own = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
    return _attend(qkv[:, 0], qkv[:, 1:], *own, *options[:6])


@register("attention_backward", "cuda", limit=full_and_plain("attention_backward", _limit))
def _backward(grad, qkv, out, lse, cu_seqlens, max_seqlen, *options):
    *options, need_dbias, _ = options
    options = options[:6]  # up to seqused_k
    dqkv = _padded_empty(qkv, empty_or_zeros(options[-1]))
    own = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
    dbias = _gradients(
        *(grad, qkv[:, 0], qkv[:, 1:], out, lse, *own, *options, need_dbias),
        *(dqkv[:, 0], dqkv[:, 1:]),
    )
    rel = qkv.new_empty(0), qkv.new_empty(0)
    return dqkv[..., : qkv.shape[3]].contiguous(), dbias, *rel


@register("cross_attention", "cuda", limit=_limit)
def _cross_forward(q, kv, *options):
    return _attend(q, kv, *options)


@register("cross_attention_backward", "cuda", limit=_limit)
def _cross_backward(grad, q, kv, *rest):
    dq, dkv = _padded_empty(q), _padded_empty(kv)
    dbias = _gradients(grad, q, kv, *rest[:-1], None, rest[-1], dq, dkv)
    dim = q.shape[2]
    return dq[..., :dim].contiguous(), dkv[..., :dim].contiguous(), dbias
