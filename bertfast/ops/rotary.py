"""Rotary positions (Su et al., arXiv:2104.09864) of packed queries and keys."""

import torch

from .declare import FLOATS, Tensor
from .extension import C
from .library import autograd, check, cpu_limit, define, dense, is_bf16, ptr, register_triton, wide
from .registry import register


def rotary(qkv: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Queries and keys turned by their positions' angles, as transformers' `rotate_half` does.

    Of a head each pair (x[j], x[j + head_dim / 2]) becomes
    (x[j] cos[j] - x[j + head_dim / 2] sin[j], x[j + head_dim / 2] cos[j] + x[j] sin[j]).

    Args:
        qkv: [tokens, 3, heads, head_dim], head_dim even.
        angles: fp32 [tokens, 2, head_dim / 2], the cosines and the sines of each token's position;
            beside fp64 qkv also fp64. They get no gradient.

    Returns: as qkv; its values are copied.

    Raises: ValueError or TypeError for arguments that don't fit together.
    """
    dim = _ROTARY.shape_of("qkv", qkv)[3]
    check(dim % 2 == 0, lambda: f"head_dim is {dim}, expected an even number: pairs are turned")
    return torch.ops.bertfast.rotary(qkv, angles, False)


_ROTARY = define(
    "rotary(Tensor qkv, Tensor angles, bool inverse) -> Tensor",
    lambda qkv, *_: torch.empty_like(qkv, memory_format=torch.contiguous_format),
    qkv=Tensor("tokens, 3, heads, head_dim", FLOATS),
    angles=Tensor("tokens, 2, head_dim / 2", "statistics of qkv or float32"),
)


@register("rotary", "reference")
def _reference(qkv, angles, inverse):
    cos, sin = angles[:, :, None, None].to(wide(qkv.dtype)).unbind(1)
    sin = -sin if inverse else sin
    turned, values = qkv.split([2, 1], 1)
    a, b = turned.chunk(2, -1)
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([turned.to(qkv.dtype), values], 1)


@register("rotary", "cpu", limit=cpu_limit)
def _cpu(qkv, angles, inverse):
    qkv, angles = dense(qkv), dense(angles)
    out = torch.empty(qkv.shape, dtype=qkv.dtype)
    tokens, _, heads, dim = qkv.shape
    C.rotary(ptr(qkv), ptr(angles), tokens, heads, dim, inverse, is_bf16(qkv), ptr(out))
    return out


register_triton("rotary", "rotary.rotary")


def _setup(ctx, inputs, output):
    _, angles, ctx.inverse = inputs
    ctx.save_for_backward(angles)


def _backward(ctx, grad):
    (angles,) = ctx.saved_tensors
    return torch.ops.bertfast.rotary(grad, angles, not ctx.inverse), None, None


autograd("rotary", _backward, _setup)
