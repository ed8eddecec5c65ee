"""Inference on weights that may change: all layers by one call into C++, on a CPU, or on a GPU for
a few tokens. On a CPU it packs a layer's weights when it comes to them. None are kept for the next
call, so none can be stale."""

from array import array

import torch
from torch import nn

from ..ops import registry
from ..ops.attention import bias_arguments, dense_last
from ..ops.extension import C
from ..ops.library import CPU_DTYPES, is_bf16, lazy, plain, ptr, real, unwatched
from ..ops.linear_act import ACTIVATIONS
from . import few_tokens
from .layer import STATES, LayerOptions, LayerWeights
from .watch import global_hooks

_MATRICES = ("wq", "wk", "wv", "wo", "w1", "w2")


def serves(hidden) -> bool:
    """Whether a forward of these hidden states [tokens, hidden] may go by `run` at all: inference
    that nobody traces, transforms or watches through a dispatch mode."""
    return (
        C is not None
        and not torch.is_grad_enabled()
        and unwatched()
        and plain(hidden)
        and (_on_cpu(hidden) or few_tokens.serves(hidden))
        and not global_hooks()
    )


def _on_cpu(hidden) -> bool:
    return (
        hidden.device.type == "cpu"
        and hidden.dtype in CPU_DTYPES
        and registry.forced() in (None, "cpu")
    )


def can_run(layers: list[LayerWeights], options: list[LayerOptions], hidden, packing) -> bool:
    """Whether `run` computes what `encoder_layer` would, layer after layer."""
    if not layers:
        return False
    first, size, inner = options[0], hidden.shape[1], layers[0].w1.shape[0]
    dtype, here = layers[0].wq.dtype, _on_cpu(hidden)
    dtypes = CPU_DTYPES if here else (hidden.dtype,)
    expected = LayerWeights.shapes(size, inner)
    return (
        all(o == first for o in options)
        and not (first.attention_dropout or first.projection_dropout or first.output_dropout)
        and dtype in (torch.float32, hidden.dtype)
        and (hidden.dtype == torch.float32 or size // first.heads % 2 == 0)
        and all(
            type(p) is nn.Parameter
            and p.device == hidden.device
            and p.dtype in dtypes
            and p.shape == shape
            for w in layers
            for p, shape in zip(w, expected, strict=True)
        )
        and not any(lazy(*w) for w in layers)
        and all(getattr(w, name).dtype == dtype for w in layers for name in _MATRICES)
        and (here or (packing.seqused_k is None and few_tokens.fits(layers, first.heads)))
    )


def run(layers: list[LayerWeights], options: LayerOptions, hidden, packing, rows=None, bias=None):
    """Arguments and result as of `encoder_layer`, one after the other; in bf16 the residual stream
    stays in fp32 between layers on a CPU."""
    if not _on_cpu(hidden):
        addresses = array("q", [p.data_ptr() for w in layers for p in w])
        sizes = options.heads, hidden.shape[1], layers[0].w1.shape[0]
        sizes += ACTIVATIONS.index(options.activation), options.eps
        return few_tokens.run(
            addresses.buffer_info()[0], len(layers), sizes, hidden, packing, rows, bias
        )
    keep = [
        tuple(
            (p if name in _MATRICES else p.float()).contiguous()
            for name, p in zip(LayerWeights._fields, w, strict=True)
        )
        for w in layers
    ]
    spec = C.LayerSpec(
        hidden=hidden.shape[1],
        heads=options.heads,
        inner=layers[0].w1.shape[0],
        activation=ACTIVATIONS.index(options.activation),
        eps=options.eps,
    )
    addresses = array("q", [p.data_ptr() for w in keep for p in w])
    address = addresses.buffer_info()[0]
    encoder = C.Encoder(spec, address, len(keep), is_bf16(layers[0].wq), int(is_bf16(hidden)))
    return forward(
        encoder, hidden.shape[1], 0, len(layers), hidden, hidden.dtype, packing, rows, bias
    )


def forward(
    encoder, size: int, first: int, last: int, hidden, dtype, packing, rows=None, bias=None
):
    """Layers [first, last) of a `C.Encoder` of this hidden size: [tokens or rows, hidden] in
    `dtype`."""
    used = packing.seqused_k
    STATES.check((hidden, size, packing.cu_seqlens, packing.seqlen, used, rows))
    for given in (hidden.dtype, dtype):
        if given not in CPU_DTYPES:
            raise TypeError(f"states of {given}, expected torch.float32 or torch.bfloat16")
    hidden, offsets, used, rows = map(real, (hidden, packing.cu_seqlens, used, rows))
    count = len(hidden) if rows is None else len(rows)
    out = torch.empty((count, hidden.shape[1]), dtype=dtype, device="cpu")
    if count:
        batch = C.Batch(
            hidden=hidden.data_ptr(),
            dtype=is_bf16(hidden),
            out=out.data_ptr(),
            out_dtype=is_bf16(out),
            cu_seqlens=offsets.data_ptr(),
            seqused_k=ptr(used),
            batch=len(offsets) - 1,
            tokens=len(hidden),
            longest=int(packing.seqlen),
            rows=ptr(rows),
            count=count,
            bias=bias_arguments(bias if bias is None else dense_last(bias)),
        )
        encoder.forward(first, last, batch)
    return out
