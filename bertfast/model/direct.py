"""A GPU's encoder layer as one node of autograd, its kernels called without torch's dispatcher.

A layer takes 7 operators forward and 7 backward. Each way through the dispatcher and autograd's
Python costs some 0.1 ms on the host, on a batch of 128 x 128 tokens more than the kernels take on
an H200. Functions and arithmetic are the operators' own; `serves` says where this may be done.
"""

import functools
from types import SimpleNamespace

import torch

from ..ops import registry
from ..ops.dropout import as_seed
from ..ops.library import GPU_DTYPES, PLAIN, lazy, once, plain, unwatched
from ..ops.linear_act import _DB, _DW, _DX, _WIDE, ACTIVATIONS

_ATTENTION, _LINEAR = ("attention", "attention_backward"), ("linear_act", "linear_act_backward")
_QKV, _NORM = ("qkv_linear", "qkv_linear_backward"), ("add_layer_norm", "add_layer_norm_backward")


@functools.lru_cache
def _kernels(device, dtype, forced, hidden, head_dim):
    """The functions that serve the operators of a layer, by name."""
    # What limits ask: the size of a row or of a head, and of a vector of parameters.
    sizes = dict.fromkeys((*_LINEAR, *_QKV, *_NORM), hidden) | dict.fromkeys(_ATTENTION, head_dim)
    found = {}
    for name, n in sizes.items():
        like = torch.empty(0, n, dtype=dtype), torch.empty(n, dtype=dtype)
        function = registry.find(name, device, dtype, like)
        # Triton's without the look at the current device, which `run` has.
        found[name] = function.kernel() if hasattr(function, "kernel") else function
    return SimpleNamespace(**found)


def serves(hidden, w, options, cu_seqlens, max_seqlen, bias) -> bool:
    """Whether `run` computes what the operators one by one would: on a GPU, where nobody traces,
    transforms or watches through a dispatch mode. What doesn't fit is left to the operators, whose
    errors name it."""
    size, inner, kind = hidden.shape[-1], w.w1.shape[0], hidden.dtype
    backends = (None, "triton", "cuda") if hidden.is_cuda else ("triton", "cuda")
    return (
        unwatched()
        and bias is None
        and plain(hidden)
        and registry.forced() in backends
        and type(max_seqlen) is int
        and cu_seqlens.dtype is torch.int32
        and cu_seqlens.dim() == 1
        and cu_seqlens.device == hidden.device
        and kind in GPU_DTYPES
        and hidden.dim() == 2
        and size % options.heads == 0
        and {*map(type, w)} <= PLAIN
        and not lazy(*w)
        and {p.dtype for p in w} <= {kind, torch.float32}
        and {p.device for p in w} == {hidden.device}
        and w.wq.shape == w.wk.shape == w.wv.shape == w.wo.shape == (size, size)
        and w.w1.shape == (inner, size)
        and w.w2.shape == (size, inner)
        and w.b1.shape == (inner,)
        and all(p.shape == (size,) for p in (w.bq, w.bk, w.bv, w.bo, w.b2, *w[8:10], *w[14:]))
        and w.wq.dtype is w.wk.dtype is w.wv.dtype
        and w.bq.dtype is w.bk.dtype is w.bv.dtype
    )


def run(hidden, w, options, cu_seqlens, max_seqlen, seqused_k, seeds, rows=None):
    """Arguments and result as of `encoder_layer`, without the query, key and value."""
    kernels = _kernels(
        hidden.device.type,
        hidden.dtype,
        registry.forced(),
        hidden.shape[1],
        hidden.shape[1] // options.heads,
    )
    drops = options.attention_dropout, options.projection_dropout, options.output_dropout
    seeds = [as_seed(s, p, hidden.device) if p else None for s, p in zip(seeds, drops, strict=True)]
    call = kernels, options, max_seqlen, (*drops, *seeds), cu_seqlens, seqused_k, rows
    if hidden.is_cuda and hidden.get_device() != torch._C._cuda_getDevice():
        with torch.cuda.device_of(hidden):
            return _run(call, hidden, w)
    return _run(call, hidden, w)


def _run(call, hidden, w):
    if torch.is_grad_enabled() and (hidden.requires_grad or any([p.requires_grad for p in w])):
        return _Layer.apply(call, hidden, *w)
    return _forward(call, hidden, _lowered(w, hidden.dtype) or w, False)[0]


_MATRICES = (0, 2, 4, 6, 10, 12)  # among LayerWeights
_CAST = (0, 2, 4, 1, 3, 5, 6, 10, 12)  # queries', keys' and values' next to each other


def _lowered(w, dtype):
    """The weights with all matrices and the biases of query, key and value in `dtype`, by one copy;
    None where they aren't all in fp32 or don't need it."""
    if dtype is torch.float32 or any(w[i].dtype is dtype for i in _CAST):
        return None
    parts, low = [w[i] for i in _CAST], list(w)
    flat = torch.empty(sum([p.numel() for p in parts]), dtype=dtype, device=w[0].device)
    for i, p, t in zip(_CAST, parts, flat.split([p.numel() for p in parts]), strict=True):
        low[i] = t.view(p.shape)
    torch._foreach_copy_([low[i] for i in _CAST], parts)
    return low


def _picked(rows, *tensors):
    return tensors if rows is None else [t.index_select(0, rows) for t in tensors]


def _forward(call, hidden, w, save):
    """-> [tokens or rows, hidden], and what backward takes besides `hidden` and weights."""
    k, options, longest, (p0, p1, p2, seed0, seed1, seed2), starts, used, rows = call
    (tokens, size), eps = hidden.shape, options.eps
    heads = (options.heads, size // options.heads)
    activation = ACTIVATIONS.index(options.activation)
    wq, bq, wk, bk, wv, bv, wo, bo, norm1, norm1_bias, w1, b1, w2, b2, norm2, norm2_bias = w
    qkv = k.qkv_linear(hidden, wq, bq, wk, bk, wv, bv).view(tokens, 3, *heads)
    scale = heads[1] ** -0.5
    context, lse = k.attention(qkv, starts, longest, scale, p0, seed0, False, None, used)
    wanted, residual = _picked(rows, context.view(tokens, size), hidden)
    projected, _ = k.linear_act(wanted, wo, None, 0, None)
    middle, *stats1 = k.add_layer_norm(projected, residual, norm1, norm1_bias, eps, bo, p1, seed1)
    inner, z = k.linear_act(middle, w1, b1, activation, save or None)
    out, _ = k.linear_act(inner, w2, None, 0, None)
    y, *stats2 = k.add_layer_norm(out, middle, norm2, norm2_bias, eps, b2, p2, seed2)
    return y, (qkv, context, lse, projected, *stats1, middle, inner, z, out, *stats2)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, hidden, *w):
        low = _lowered(w, hidden.dtype)
        y, saved = _forward(call, hidden, low or w, True)
        kernels, options, longest, (*drops, seed0, seed1, seed2), starts, used, rows = call
        ctx.call = kernels, options, longest, drops, _WIDE if low else 0
        if low:  # the biases' own dtype is their gradients'
            w = [low[i] if i in _MATRICES else p for i, p in enumerate(w)]
        ctx.save_for_backward(starts, used, rows, seed0, seed1, seed2, *saved, hidden, *w)
        return y

    @staticmethod
    def backward(ctx, grad):
        return _once(ctx, grad)


def _operators():
    """The layer's operators by torch's dispatcher, which takes batched gradients too (torch.func,
    is_grads_batched)."""
    names = (*_ATTENTION, *_LINEAR, *_QKV, *_NORM)
    return SimpleNamespace(**{name: getattr(torch.ops.bertfast, name) for name in names})


def _is_batched(grad) -> bool:
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(grad) or functorch.is_legacy_batchedtensor(grad)


def _backward(ctx, grad):
    k, options, longest, (p0, p1, p2), wide = ctx.call
    k = k if plain(grad) and not _is_batched(grad) else _operators()
    starts, used, rows, seed0, seed1, seed2, *saved = ctx.saved_tensors
    *saved, wq, bq, wk, _, wv, _, wo, bo, norm1, norm1_bias, w1, b1, w2, b2, norm2, norm2_bias = (
        saved
    )
    qkv, context, lse, projected, mean1, rstd1, middle, inner, z, out, mean2, rstd2, hidden = saved
    needs = ctx.needs_input_grad[2:]
    activation, flat = ACTIVATIONS.index(options.activation), hidden.shape

    def need(weight, bias=None):
        biases = bias is not None and needs[bias]
        return _DX | _DW * needs[weight] | _DB * biases | wide

    def norm(grad, x, residual, weight, bias, stats, x_bias, p, seed):
        dx, ds, dw, db, dx_bias = k.add_layer_norm_backward(
            grad, x, residual, weight, *stats, x_bias, p, seed
        )
        return dx, dx if seed is None else ds, dw, db.to(bias.dtype), dx_bias

    dout, dmiddle, *dnorm2, db2 = norm(
        grad, out, middle, norm2, norm2_bias, (mean2, rstd2), b2, p2, seed2
    )
    dinner, dw2, _ = k.linear_act_backward(dout, inner, w2, None, None, 0, need(12))
    d, dw1, db1 = k.linear_act_backward(dinner, middle, w1, b1, z, activation, need(10, 11))
    dmiddle = d.add_(dmiddle)
    wanted, residual = _picked(rows, context.view(flat), hidden)
    dprojected, dresidual, *dnorm1, dbo = norm(
        dmiddle, projected, residual, norm1, norm1_bias, (mean1, rstd1), bo, p1, seed1
    )
    dcontext, dwo, _ = k.linear_act_backward(dprojected, wanted, wo, None, None, 0, need(6))
    if rows is not None:
        dcontext, dresidual = (
            torch.zeros_like(hidden).index_add(0, rows, t) for t in (dcontext, dresidual)
        )
    dqkv, _ = k.attention_backward(
        *(dcontext.view(context.shape), qkv, context, lse, starts, longest),
        *(qkv.shape[3] ** -0.5, p0, seed0, False, None, used, False),
    )
    through = ctx.needs_input_grad[1]
    three = _DX * through | _DW * any(needs[0:6:2]) | _DB * any(needs[1:6:2]) | wide
    dhidden, dwq, dwk, dwv, dbq, dbk, dbv = k.qkv_linear_backward(
        dqkv.view(flat[0], 3 * flat[1]), hidden, wq, wk, wv, bq, three
    )
    found = (dwq, dbq, dwk, dbk, dwv, dbv, dwo, dbo, *dnorm1, dw1, db1, dw2, db2, *dnorm2)
    return (
        None,
        dhidden.add_(dresidual) if through else None,
        *(g if n else None for g, n in zip(found, needs, strict=True)),
    )


_once = once("encoder_layer", _backward)
