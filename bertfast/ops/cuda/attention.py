"""`ops.attention` on csrc/cuda/attention.cu: tensor cores, head dims to 128."""

import torch
from torch.nn import functional as F

from ..attention import bias_arguments, check_offsets, dense_last
from ..extension import C
from ..library import cuda_float_limit, cuda_queue, dense, ptr
from ..registry import register
from .arguments import dropout, dtype_code

HEAD_DIMS = (32, 64, 128)  # others are padded with zeros to the next


def _limit(device, dtype, arguments):
    head_dim = arguments[0].shape[-1] if arguments else 0  # qkv's, in backward grad's
    if head_dim > HEAD_DIMS[-1]:
        return f"head_dim is {head_dim}, it takes at most {HEAD_DIMS[-1]}"
    return cuda_float_limit(device, dtype, arguments)


def _head_dim(dim):
    return next(d for d in HEAD_DIMS if d >= dim)


def _padded(t):
    """t with zeros up to the head dimension that kernels have."""
    extra = _head_dim(t.shape[-1]) - t.shape[-1]
    return F.pad(t, (0, extra)) if extra else t


def _aligned(qkv):
    """qkv as it is where the kernel can read it by 16 bytes, else a copy."""
    t = _padded(qkv)
    rows = all(s * t.element_size() % 16 == 0 for s in t.stride()[:-1])
    if t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and rows:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _arguments(qkv, cu_seqlens, max_seqlen, scale, dropout_p, seed, causal, bias):
    tokens, _, heads, head_dim = qkv.shape
    pointer, batch, head, query, _ = bias_arguments(bias)
    return (
        *(dtype_code(qkv), ptr(qkv), *qkv.stride()[:3], ptr(cu_seqlens), cu_seqlens.shape[0] - 1),
        *(tokens, heads, head_dim, max_seqlen, scale, pointer),
        *(bias is not None and bias.dtype == torch.float32, batch, head, query),
        *(*dropout(dropout_p, seed), causal),
    )


@register("attention", "cuda", limit=_limit)
def _forward(qkv, cu_seqlens, max_seqlen, scale, dropout_p, seed, causal, bias):
    tokens, _, heads, head_dim = qkv.shape
    cu_seqlens, seed = dense(cu_seqlens), dense(seed)
    check_offsets(cu_seqlens, tokens, max_seqlen)
    qkv, bias = _aligned(qkv), None if bias is None else dense_last(bias)
    out = torch.empty((tokens, heads, qkv.shape[3]), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((heads, tokens), device=qkv.device)
    C.cuda_attention(
        *_arguments(qkv, cu_seqlens, max_seqlen, scale, dropout_p, seed, causal, bias),
        *(ptr(out), ptr(lse), *cuda_queue(qkv)),
    )
    return out[..., :head_dim].contiguous(), lse


@register("attention_backward", "cuda", limit=_limit)
def _backward(
    grad, qkv, out, lse, cu_seqlens, max_seqlen, scale, dropout_p, seed, causal, bias, need_dbias
):
    tokens, _, heads, head_dim = qkv.shape
    cu_seqlens, seed, lse = dense(cu_seqlens), dense(seed), dense(lse)
    qkv, bias = _aligned(qkv), None if bias is None else dense_last(bias)
    grad, out = _aligned(grad.contiguous()), _aligned(out.contiguous())
    dqkv = torch.empty((tokens, 3, heads, qkv.shape[3]), dtype=qkv.dtype, device=qkv.device)
    delta = torch.empty((heads, tokens), device=qkv.device)
    dbias, rows, columns = None, 0, 0
    if need_dbias:
        # One full square per sequence and head, so that no two thread blocks add to one place.
        rows, columns = bias.shape[2:]
        batch = cu_seqlens.shape[0] - 1
        dbias = torch.zeros((batch, heads, rows, columns), device=qkv.device)
    C.cuda_attention_backward(
        *_arguments(qkv, cu_seqlens, max_seqlen, scale, dropout_p, seed, causal, bias),
        *(ptr(grad), ptr(out), ptr(lse), ptr(delta), ptr(dqkv), ptr(dbias), rows, columns),
        *cuda_queue(qkv),
    )
    dqkv = dqkv[..., :head_dim].contiguous()
    if not need_dbias:
        return dqkv, torch.empty(0, dtype=qkv.dtype, device=qkv.device)
    return dqkv, dbias.sum_to_size(bias.shape).to(bias.dtype)
