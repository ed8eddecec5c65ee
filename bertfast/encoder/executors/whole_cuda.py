"""Inference of a few tokens on a GPU, where launches take longer than kernels: all layers by one
call into csrc/cuda/encoder.cu, in which each kernel starts before the one ahead of it has ended
(sm_90)."""

import functools

import torch

from ...ops import registry
from ...ops.attention import dense_last
from ...ops.cuda.arguments import HALVES, MAX_HIDDEN
from ...ops.cuda.attention import HEAD_DIMS
from ...ops.cuda.linear_act import FEW_TOKENS
from ...ops.extension import C
from ...ops.library import CUDA_DEVICE, cuda_limit, cuda_queue, lazy, ptr, real
from ..batch import Batch
from ..spec import Layer, LayerSpec
from ..weights import BERT, addresses, shapes
from .whole_cpu import EVEN, c_batch, c_spec, flat_weights, inference_limit, layers_limit

DEVICE = CUDA_DEVICE


def limit(layers: list[Layer], batch: Batch) -> str | None:
    hidden = batch.hidden
    return call_limit(layers[0].spec, batch) or weights_limit(layers, hidden.dtype, hidden.device)


def call_limit(spec: LayerSpec, batch: Batch) -> str | None:
    """What of a call, beside the weights."""
    hidden = batch.hidden
    if hidden.device.type != CUDA_DEVICE or hidden.dtype not in HALVES:
        return f"it takes bfloat16 or float16 on a GPU, not {hidden.dtype} on {hidden.device}"
    # A test build has CUDA's kernels on the CPU, where they serve on request alone.
    if registry.forced() not in (("cuda",) if CUDA_DEVICE == "cpu" else (None, "cuda")):
        return f"backend {registry.forced()!r} is forced"
    why = cuda_limit(CUDA_DEVICE, None, ()) or inference_limit(batch)
    if why:
        return why
    if batch.even is not None:
        return EVEN
    if batch.captured:  # and these kernels run slower than cuBLAS's and Triton's
        return "a CUDA graph's launches cost nothing"
    if len(hidden) > FEW_TOKENS:
        return f"there are {len(hidden)} tokens, it takes up to {FEW_TOKENS}"
    if not _new_enough(hidden.device):
        return "the GPU is older than sm_80"
    if spec.head_dim not in HEAD_DIMS or spec.hidden % 8 or spec.inner % 8:
        return "the sizes don't fit its tiles"
    if spec.activation == "silu":
        return "it has no silu"
    if spec.hidden > MAX_HIDDEN:
        return f"hidden is {spec.hidden}, it takes at most {MAX_HIDDEN}"
    return None


def weights_limit(layers: list[Layer], dtype: torch.dtype, device: torch.device) -> str | None:
    """What of the layers: for weights that stay, asked once."""
    why, flat, spec = layers_limit(layers), flat_weights(layers), layers[0].spec
    if why:
        return why
    if not spec.like_bert or any(layer.spec != spec for layer in layers):
        return "it takes layers as BERT's"
    if {p.dtype for p in flat} != {dtype} or {p.device for p in flat} != {device}:
        return f"the weights are not all in {dtype} on {device}"
    if [p.shape for p in flat] != shapes(layers[0].spec)[:BERT] * len(layers) or lazy(*flat):
        return "the weights' shapes don't fit together"
    if not all(p.is_contiguous() and p.data_ptr() % 16 == 0 for p in flat):
        return "a weight is not dense or not aligned to 16 bytes"
    return None


@functools.cache
def _new_enough(device) -> bool:
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 0)


def run(layers: list[Layer], batch: Batch) -> torch.Tensor:
    at = addresses([layer.weights for layer in layers])
    return forward(layers[0].spec, at.buffer_info()[0], len(layers), batch)


def forward(spec: LayerSpec, address: int, layers: int, batch: Batch) -> torch.Tensor:
    """Of so many layers, whose `addresses` are there."""
    parts = batch.hidden, batch.cu_seqlens, batch.seqused_k, batch.rows
    hidden, starts, used, rows = map(real, parts)
    if hidden.data_ptr() % 16:
        hidden = hidden.clone()
    count = len(hidden) if rows is None else len(rows)
    out = torch.empty((count, hidden.shape[1]), dtype=hidden.dtype, device=hidden.device)
    bias = None if batch.bias is None else dense_last(batch.bias)
    spec = c_spec(spec)
    given = c_batch(batch, hidden, out, starts, used, rows, bias)
    size = C.cuda_encoder_workspace(spec, given)
    workspace = torch.empty(size, dtype=torch.uint8, device=hidden.device)
    C.cuda_encoder(spec, address, layers, given, ptr(workspace), *cuda_queue(hidden))
    return out
