"""Inference on a CPU: all layers by one call into C++. It packs the weights of a layer when it
comes to it and keeps none for the next call, so that none can be stale; packed.py keeps them."""

import functools
from operator import attrgetter

import torch

from ...ops import registry
from ...ops.attention import bias_arguments, dense_last
from ...ops.extension import C, error
from ...ops.library import CPU_DTYPES, GPU_DTYPES, is_bf16, lazy, plain, ptr, real
from ...ops.linear_act import ACTIVATIONS
from ..batch import Batch
from ..spec import Layer, LayerSpec
from ..weights import BERT, IS_MATRIX, addresses, shapes

_shape, _dtype, _device = attrgetter("shape"), attrgetter("dtype"), attrgetter("device")
DEVICE = "cpu"
EVEN = "rows of padding see all places alike"
_MATRICES = IS_MATRIX[:BERT]


def limit(layers: list[Layer], batch: Batch) -> str | None:
    hidden = batch.hidden
    if not hidden.is_cpu or hidden.dtype not in CPU_DTYPES:
        return f"it takes float32 or bfloat16 on a CPU, not {hidden.dtype} on {hidden.device}"
    if C is None:
        return error
    if registry.forced() not in (None, "cpu"):
        return f"backend {registry.forced()!r} is forced"
    if hidden.dtype != torch.float32 and layers[0].spec.head_dim % 2:
        return f"heads of {layers[0].spec.head_dim} are no pairs"
    return inference_limit(batch) or layers_limit(layers) or _weights_limit(layers, hidden)


def inference_limit(batch: Batch) -> str | None:
    """What keeps a call from any executor of whole encoders."""
    if torch.is_grad_enabled():
        return "gradients are enabled"
    if batch.bias is not None and not plain(batch.bias):
        return "the bias on the scores is no plain tensor"
    if batch.even is not None:
        return EVEN
    return None


def layers_limit(layers: list[Layer]) -> str | None:
    """And which layers."""
    spec = layers[0].spec
    if any(layer.spec != spec for layer in layers):
        return "the layers differ in more than their weights"
    if any(any(layer.dropout) for layer in layers):
        return "it has no dropout"
    if spec.width != spec.hidden:
        return "heads were pruned"
    if not spec.like_bert:
        return "it takes layers as BERT's"
    return None


def flat_weights(layers: list[Layer]) -> list[torch.Tensor]:
    return [p for layer in layers for p in layer.weights.present()]


def _weights_limit(layers, hidden):
    flat = flat_weights(layers)
    if len(flat) != BERT * len(layers):
        return "a bias is missing"
    dtypes = list(map(_dtype, flat))
    matrices = {dtype for dtype, matrix in zip(dtypes, _MATRICES * len(layers)) if matrix}  # noqa: B905
    if len(matrices) > 1 or not matrices <= {torch.float32, hidden.dtype}:
        return f"the matrices are in {sorted(map(str, matrices))} beside {hidden.dtype}"
    if not {*dtypes} <= {*CPU_DTYPES} or {*map(_device, flat)} != {hidden.device} or lazy(*flat):
        return "a parameter is no float32 or bfloat16 in this CPU's memory"
    if list(map(_shape, flat)) != shapes(layers[0].spec)[:BERT] * len(layers):
        return "the weights' shapes don't fit together"
    return None


@functools.lru_cache
def c_spec(spec: LayerSpec):
    """Of C++."""
    return C.LayerSpec(
        hidden=spec.hidden,
        heads=spec.heads,
        inner=spec.inner,
        activation=ACTIVATIONS.index(spec.activation),
        eps=spec.eps,
    )


def run(layers: list[Layer], batch: Batch):
    """In bf16 the residual stream stays in fp32 between layers."""
    spec, hidden = layers[0].spec, batch.hidden
    keep = [
        p if matrix or p.dtype is torch.float32 else p.float()
        for p, matrix in zip(flat_weights(layers), _MATRICES * len(layers), strict=True)
    ]
    keep = [p if p.is_contiguous() else p.contiguous() for p in keep]
    own = iter(keep)
    at = addresses([layer.weights.filled(own) for layer in layers])
    encoder = C.Encoder(
        *(c_spec(spec), at.buffer_info()[0], len(layers), is_bf16(keep[0]), int(is_bf16(hidden)))
    )
    return forward(encoder, 0, len(layers), batch, hidden.dtype)


def forward(encoder, first: int, last: int, batch: Batch, dtype):
    """Layers [first, last) of a `C.Encoder`, whose size the batch was checked for: [tokens or rows,
    hidden] in `dtype`."""
    for given in (batch.hidden.dtype, dtype):
        if given not in CPU_DTYPES:
            raise TypeError(f"states of {given}, expected torch.float32 or torch.bfloat16")
    parts = batch.hidden, batch.cu_seqlens, batch.seqused_k, batch.rows
    hidden, starts, used, rows = map(real, parts)
    count = len(hidden) if rows is None else len(rows)
    out = torch.empty((count, hidden.shape[1]), dtype=dtype, device="cpu")
    if count:
        bias = None if batch.bias is None else dense_last(batch.bias)
        encoder.forward(first, last, c_batch(batch, hidden, out, starts, used, rows, bias))
    return out


def c_batch(batch, hidden, out, starts, used, rows, bias):
    """Of C++, with whatever stands for the batch's tensors in memory."""
    return C.Batch(
        hidden=hidden.data_ptr(),
        dtype=GPU_DTYPES.index(hidden.dtype),  # DType in csrc/layer.h has the same order
        out=out.data_ptr(),
        out_dtype=GPU_DTYPES.index(out.dtype),
        cu_seqlens=starts.data_ptr(),
        seqused_k=ptr(used),
        batch=len(starts) - 1,
        tokens=len(hidden),
        longest=int(batch.longest),
        rows=ptr(rows),
        count=len(out),
        bias=bias_arguments(bias),
    )
