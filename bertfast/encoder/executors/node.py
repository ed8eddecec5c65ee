"""A layer as one node of autograd, its kernels called without torch's dispatcher.

A layer takes 7 operators forward and 7 backward. Each way through the dispatcher and autograd's
Python costs some 0.1 ms on the host, on a batch of 128 x 128 tokens more than the kernels take on
an H200.
"""

import functools
from types import SimpleNamespace

import torch

from ...ops import registry
from ...ops.library import CPU_DTYPES, GPU_DTYPES, lazy, once, plain
from ...ops.linear_act import _WIDE
from .. import layer as arithmetic
from ..batch import Batch
from ..spec import DROPOUTS, Layer, Seeds
from ..weights import BERT, FLAT, IS_MATRIX, LayerWeights, Parameters, fit
from .operators import DISPATCHED
from .whole_cpu import EVEN

DEVICE = None
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


def limit(layers: list[Layer], batch: Batch) -> str | None:
    """Why not, or None. What doesn't fit is left to the operators, whose errors name it."""
    hidden, starts, forced = batch.hidden, batch.cu_seqlens, registry.forced()
    kind, here = hidden.dtype, hidden.is_cpu and forced in (None, "cpu")
    if forced == "reference":
        return "the reference is forced"
    if kind not in (CPU_DTYPES if here else GPU_DTYPES):
        return f"it takes no {kind}"
    if type(batch.longest) is not int or starts.dtype is not torch.int32 or starts.dim() != 1:
        return "the sequences are no int32 offsets with a longest one that is known"
    if batch.bias is not None and not (here and plain(batch.bias)):
        return "it takes a bias on the scores on a CPU alone"
    if batch.even is not None:
        return EVEN
    for spec, weights, *_ in layers:
        w = weights.flat()[:BERT]
        if not spec.like_bert or any([p is None for p in w]):
            return "it takes layers as BERT's, with all their biases"
        if hidden.shape[-1] != spec.hidden or not fit(spec, weights):
            return "the weights' shapes don't fit together"
        if not {p.dtype for p in w} <= {kind, torch.float32} or lazy(*w):
            return f"the weights are neither in {kind} nor float32"
        if {p.device for p in w} | {starts.device} != {hidden.device}:
            return "the tensors are on several devices"
        for three in zip(weights.query, weights.key, weights.value, strict=True):
            if len({p.dtype for p in three}) > 1:
                return "the query's, key's and value's dtypes differ"
    return None


def run(layers: list[Layer], batch: Batch) -> torch.Tensor:
    hidden = batch.hidden
    if hidden.is_cuda and hidden.get_device() != torch._C._cuda_getDevice():
        with torch.cuda.device_of(hidden):
            return arithmetic.each(layers, batch, one)
    return arithmetic.each(layers, batch, one)


def one(
    layer: Layer, batch: Batch, hidden: torch.Tensor, seeds: Seeds | None, rows: torch.Tensor | None
) -> torch.Tensor:
    """[tokens or rows, hidden]"""
    spec, flat = layer.spec, layer.weights.flat()[:BERT]
    device = hidden.device.type
    kernels = _kernels(device, hidden.dtype, registry.forced(), spec.hidden, spec.head_dim)
    seeds = arithmetic.seeds_of(layer, seeds, hidden.device)
    wanted = (hidden, *flat) if batch.bias is None else (hidden, batch.bias, *flat)
    call = kernels, layer, batch, seeds, rows
    if torch.is_grad_enabled() and any([t.requires_grad for t in wanted]):
        return _Node.apply(call, hidden, batch.bias, *flat)
    layer = layer._replace(weights=_lowered(flat, hidden) or layer.weights)
    return arithmetic.forward(kernels, layer, batch, hidden, seeds, rows, False)[0]


# What a GPU casts: queries', keys' and values' next to each other.
_CAST = [FLAT.index((r, part)) for part in Parameters._fields for r in ("query", "key", "value")]
_CAST += [FLAT.index((role, "weight")) for role in ("out", "up", "down")]


def _lowered(flat, hidden) -> LayerWeights | None:
    """The weights with all matrices and the biases of query, key and value in hidden's dtype, by
    one copy; None where they aren't all in fp32, or kernels take them beside it."""
    dtype = hidden.dtype
    if hidden.is_cpu and registry.forced() in (None, "cpu"):
        return None
    if dtype is torch.float32 or any(flat[i].dtype is dtype for i in _CAST):
        return None
    parts, low = [flat[i] for i in _CAST], list(flat)
    whole = torch.empty(sum([p.numel() for p in parts]), dtype=dtype, device=hidden.device)
    for i, p, t in zip(_CAST, parts, whole.split([p.numel() for p in parts]), strict=True):
        low[i] = t.view(p.shape)
    torch._foreach_copy_([low[i] for i in _CAST], parts)
    return LayerWeights.of(low)


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, hidden, bias, *flat):
        kernels, layer, batch, seeds, rows = call
        low = _lowered(flat, hidden)
        layer = layer._replace(weights=low or LayerWeights.of(flat))
        y, saved = arithmetic.forward(kernels, layer, batch, hidden, seeds, rows, True)
        ctx.call = kernels, layer.spec, batch.longest, layer.dropout, _WIDE if low else 0
        if low:  # the biases' own dtype is their gradients'
            cast = low.flat()[:BERT]
            flat = [
                cast[i] if m else p
                for i, (m, p) in enumerate(zip(IS_MATRIX[:BERT], flat, strict=True))
            ]
        sequences = batch.cu_seqlens, batch.seqused_k, bias
        ctx.save_for_backward(*sequences, rows, *seeds, *saved, hidden, *flat)
        return y

    @staticmethod
    def backward(ctx, grad):
        return _once(ctx, grad)


def is_batched(grad: torch.Tensor) -> bool:
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(grad) or functorch.is_legacy_batchedtensor(grad)


def _backward(ctx, grad):
    k, spec, longest, rates, wide = ctx.call
    k = k if plain(grad) and not is_batched(grad) else DISPATCHED
    starts, used, bias, rows, *saved = ctx.saved_tensors
    n = BERT
    seeds, saved = saved[:DROPOUTS], saved[DROPOUTS:]
    saved, hidden, flat = saved[: -n - 1], saved[-n - 1], saved[-n:]
    _, through, through_bias, *needs = ctx.needs_input_grad
    return None, *arithmetic.backward(
        *(k, spec, LayerWeights.of(flat), Batch(hidden, starts, longest, used, bias=bias)),
        *((rates, seeds), rows, saved, hidden, grad),
        (through, through_bias, LayerWeights.of(needs)),
        wide,
    )


_once = once("encoder_layer", _backward)
