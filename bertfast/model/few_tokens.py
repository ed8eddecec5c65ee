"""Inference of a few tokens on a GPU, where launches take longer than kernels: all layers by one
call into csrc/cuda/encoder.cu, in which each kernel starts before the one ahead of it has ended
(sm_90)."""

import functools
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from ..ops import registry
from ..ops.attention import bias_arguments, dense_last
from ..ops.cuda.arguments import HALVES, MAX_HIDDEN, dtype_code
from ..ops.cuda.attention import HEAD_DIMS
from ..ops.cuda.linear_act import FEW_TOKENS
from ..ops.extension import C
from ..ops.library import CUDA_DEVICE, cuda_limit, cuda_queue, ptr, real
from ..ops.linear_act import ACTIVATIONS as OPERATOR_ACTIVATIONS
from .layer import ACTIVATIONS, STATES

_off = ContextVar("off", default=False)


@contextmanager
def off():
    """Inside, `serves` nothing: a CUDA graph's launches cost nothing, and these kernels run slower
    than cuBLAS's and Triton's."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


def serves(hidden) -> bool:
    """Whether `run` takes these hidden states [tokens, hidden], or their tokens from [batch,
    seqlen, hidden]."""
    # A test build has CUDA's kernels on the CPU, where they serve on request alone.
    backends = ("cuda",) if CUDA_DEVICE == "cpu" else (None, "cuda")
    return (
        hidden.device.type == CUDA_DEVICE
        and hidden.numel() <= FEW_TOKENS * hidden.shape[-1]
        and hidden.dtype in HALVES
        and registry.forced() in backends
        and cuda_limit(CUDA_DEVICE, None, ()) is None
        and _new_enough(hidden.device)
        and not _off.get()
    )


@functools.cache
def _new_enough(device) -> bool:
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 0)


def fits(weights, heads: int) -> bool:
    """Whether `run` takes these layers, a list of `LayerWeights`, all of the hidden states'
    dtype."""
    hidden, inner = weights[0].wq.shape[0], weights[0].w1.shape[0]
    return (
        hidden // heads in HEAD_DIMS
        and hidden % 8 == inner % 8 == 0
        and hidden <= MAX_HIDDEN
        and all(p.is_contiguous() and p.data_ptr() % 16 == 0 for w in weights for p in w)
    )


def sizes(config) -> tuple[int, int, int, int, float]:
    """What `run` takes of a configuration."""
    activation = OPERATOR_ACTIVATIONS.index(ACTIVATIONS[config.hidden_act])
    return (
        *(config.num_attention_heads, config.hidden_size, config.intermediate_size),
        *(activation, config.layer_norm_eps),
    )


def run(addresses: int, layers: int, sizes, hidden, packing, rows=None, bias=None):
    """The layers' result [tokens or rows, hidden], in hidden's dtype.

    addresses: of int64 [layers, 16], the weights' addresses in the order of `LayerWeights`.
    sizes: heads, hidden, inner size, the activation's number in ops.linear_act, eps.
    """
    used = packing.seqused_k
    STATES.check((hidden, sizes[1], packing.cu_seqlens, int(packing.seqlen), used, rows))
    hidden, offsets, used, rows = map(real, (hidden, packing.cu_seqlens, used, rows))
    if hidden.data_ptr() % 16:
        hidden = hidden.clone()
    tokens = len(hidden)
    count = tokens if rows is None else len(rows)
    out = torch.empty((count, sizes[1]), dtype=hidden.dtype, device=hidden.device)
    heads, size, inner, activation, eps = sizes
    spec = C.LayerSpec(hidden=size, heads=heads, inner=inner, activation=activation, eps=eps)
    batch = C.Batch(
        hidden=hidden.data_ptr(),
        dtype=dtype_code(hidden),
        out=out.data_ptr(),
        out_dtype=dtype_code(out),
        cu_seqlens=offsets.data_ptr(),
        seqused_k=ptr(used),
        batch=len(offsets) - 1,
        tokens=tokens,
        longest=int(packing.seqlen),
        rows=ptr(rows),
        count=count,
        bias=bias_arguments(bias if bias is None else dense_last(bias)),
    )
    size = C.cuda_encoder_workspace(spec, batch)
    workspace = torch.empty(size, dtype=torch.uint8, device=hidden.device)
    C.cuda_encoder(spec, addresses, layers, batch, ptr(workspace), *cuda_queue(hidden))
    return out
