"""Padded <-> packed: the tokens that a 0/1 mask keeps, row by row, without the padding."""

import torch

from .declare import Below, Declaration, Number, Tensor
from .extension import C
from .library import (
    autograd,
    call,
    cpu_limit,
    cuda_limit,
    cuda_queue,
    define,
    dense,
    ptr,
    register_triton,
    triton_limit,
)
from .registry import register

_C_LIMIT = lambda device, dtype, arguments: cpu_limit(device, torch.float32, ())
_TRITON_LIMIT = lambda device, dtype, arguments: triton_limit(device, torch.float32, ())


def pack(
    x: torch.Tensor, attention_mask: torch.Tensor, tokens: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Drop the padding of a batch.

    Args:
        x: [batch, seqlen, ...], any dtype.
        attention_mask: [batch, seqlen], bool or number; non-zero keeps a position. Any pattern.
        tokens: how many the mask keeps, where the caller knows: a GPU's host then need not wait
            to learn it. A wrong number raises ValueError on a CPU; on a GPU it loses the last
            tokens or repeats position 0.

    Returns: packed [tokens, ...], indices [tokens] int64 (into batch * seqlen), cu_seqlens
    [batch + 1] int32, and max_seqlen: the padded length, a bound that needs no host
    synchronisation.

    Raises: ValueError where the mask is not [batch, seqlen] of x.
    """
    _PACK.check((x, attention_mask, tokens))
    indices, cu_seqlens = call("pack_indices", attention_mask, tokens)
    return gather(x, indices), indices, cu_seqlens, attention_mask.shape[1]


def gather(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows `indices` of x [batch, seqlen, ...] seen as [batch * seqlen, ...]."""
    return call("gather_rows", x.flatten(0, 1), indices)


def unpack(packed: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    """The inverse of `pack`: [tokens, ...] -> [batch, seqlen, ...], zeros at the padding."""
    _UNPACK.check((packed, indices, batch, seqlen), values=False)
    rows = call("scatter_rows", packed, indices, batch * seqlen)
    return rows.unflatten(0, (batch, seqlen))


def _fake_indices(mask, tokens=None):
    if tokens is None:
        tokens = torch.library.get_ctx().new_dynamic_size()
    return (
        mask.new_empty((tokens,), dtype=torch.int64),
        mask.new_empty((mask.shape[0] + 1,), dtype=torch.int32),
    )


_PACK = Declaration(
    "pack(Tensor x, Tensor attention_mask, SymInt? tokens) -> Tensor",
    x=Tensor("batch, seqlen, ..."),
    attention_mask=Tensor("batch, seqlen"),
    tokens=Number(0),
)
_UNPACK = Declaration(
    "unpack(Tensor packed, Tensor indices, SymInt batch, SymInt seqlen) -> Tensor",
    packed=Tensor("tokens, ..."),
    indices=Tensor("tokens", torch.int64),
    batch=Number(0),
    seqlen=Number(0),
)
define(
    "pack_indices(Tensor mask, SymInt? tokens=None) -> (Tensor, Tensor)",
    _fake_indices,
    mask=Tensor("batch, seqlen"),
    tokens=Number(0),
)


@register("pack_indices", "reference")
@register("pack_indices", "cpu", limit=_C_LIMIT)
@register("pack_indices", "triton", limit=_TRITON_LIMIT)
@register("pack_indices", "cuda", limit=cuda_limit)
def _indices_reference(mask, tokens=None):
    mask = mask != 0
    lengths = mask.sum(1, dtype=torch.int32)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    if tokens is None or mask.device.type == "cpu":
        indices = mask.flatten().nonzero().squeeze(1)
        if tokens is not None and indices.shape[0] != tokens:
            raise ValueError(f"tokens is {tokens}, yet the mask keeps {indices.shape[0]} positions")
    else:
        indices = torch.nonzero_static(mask.flatten(), size=tokens, fill_value=0).squeeze(1)
        cu_seqlens.clamp_(max=tokens)
    return indices, cu_seqlens


define(
    "gather_rows(Tensor x, Tensor indices) -> Tensor",
    lambda x, indices: x.new_empty((indices.shape[0], *x.shape[1:])),
    x=Tensor("rows, ..."),
    indices=Tensor("tokens", torch.int64, Below("rows")),
)
define(
    "scatter_rows(Tensor x, Tensor indices, SymInt rows) -> Tensor",
    lambda x, indices, rows: x.new_empty((rows, *x.shape[1:])),
    x=Tensor("tokens, ..."),
    indices=Tensor("tokens", torch.int64, Below("rows")),
    rows=Number(0),
)


@register("gather_rows", "reference")
def _gather_reference(x, indices):
    return x.index_select(0, indices)


@register("scatter_rows", "reference")
def _scatter_reference(x, indices, rows):
    return x.new_zeros((rows, *x.shape[1:])).index_copy_(0, indices, x)


def _row_bytes(x):
    return x[0].numel() * x.element_size() if x.shape[0] else 0


@register("gather_rows", "cpu", limit=_C_LIMIT)
def _gather_cpu(x, indices):
    x, indices = dense(x), dense(indices)
    out = torch.empty((indices.shape[0], *x.shape[1:]), dtype=x.dtype)
    C.gather_rows(ptr(x), ptr(indices), ptr(out), indices.shape[0], _row_bytes(x))
    return out


@register("scatter_rows", "cpu", limit=_C_LIMIT)
def _scatter_cpu(x, indices, rows):
    x, indices = dense(x), dense(indices)
    out = torch.empty((rows, *x.shape[1:]), dtype=x.dtype)
    if out.numel():
        C.scatter_rows(ptr(x), ptr(indices), ptr(out), x.shape[0], rows, out[0].nbytes)
    return out


register_triton("gather_rows", "pack.gather_rows", _TRITON_LIMIT)
register_triton("scatter_rows", "pack.scatter_rows", _TRITON_LIMIT)


@register("gather_rows", "cuda", limit=cuda_limit)
def _gather_cuda(x, indices):
    x, indices = dense(x), dense(indices)
    out = torch.empty((indices.shape[0], *x.shape[1:]), dtype=x.dtype, device=x.device)
    C.cuda_gather_rows(
        *(ptr(x), ptr(indices), ptr(out), indices.shape[0], _row_bytes(x)), *cuda_queue(x)
    )
    return out


@register("scatter_rows", "cuda", limit=cuda_limit)
def _scatter_cuda(x, indices, rows):
    x, indices = dense(x), dense(indices)
    out = torch.empty((rows, *x.shape[1:]), dtype=x.dtype, device=x.device)
    if out.numel():
        C.cuda_scatter_rows(
            *(ptr(x), ptr(indices), ptr(out), x.shape[0], rows, out[0].nbytes), *cuda_queue(x)
        )
    return out


def _gather_setup(ctx, inputs, output):
    ctx.rows = inputs[0].shape[0]
    ctx.save_for_backward(inputs[1])


def _gather_backward(ctx, grad):
    return torch.ops.bertfast.scatter_rows(grad, ctx.saved_tensors[0], ctx.rows), None


def _scatter_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _scatter_backward(ctx, grad):
    return torch.ops.bertfast.gather_rows(grad, ctx.saved_tensors[0]), None, None


# Each is the other's adjoint because `pack` makes indices without repeats.
autograd("gather_rows", _gather_backward, _gather_setup)
autograd("scatter_rows", _scatter_backward, _scatter_setup)
