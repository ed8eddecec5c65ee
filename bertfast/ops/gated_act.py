"""Gated linear units' elementwise part (Shazeer, arXiv:2002.05202): GeGLU with GELU, SwiGLU with
SiLU."""

import torch

from .attention import dense_last
from .declare import FLOATS, PROBABILITY, SEED, Number, Tensor
from .dropout import Seed, as_seed, dropout_arguments, dropped
from .extension import C
from .library import (
    autograd,
    cpu_limit,
    define,
    dense,
    is_bf16,
    ptr,
    register_triton,
    wide,
)
from .linear_act import ACTIVATION, activate, activation_index, derivative
from .registry import register


def gated_act(
    up: torch.Tensor,
    gate: torch.Tensor,
    activation: str = "gelu",
    *,
    dropout_p: float = 0.0,
    seed: Seed | None = None,
) -> torch.Tensor:
    """dropout(activation(up) * gate).

    Args:
        up, gate: [tokens, inner], one dtype; views of one [tokens, 2 * inner] are read in place.
        activation: see `linear_act`.
        dropout_p, seed: see `ops.dropout`; row = token, column = inner index.

    Returns: [tokens, inner] in up's dtype; arithmetic in fp32.

    Raises: ValueError or TypeError for arguments that don't fit together.
    """
    _GATED_ACT.shape_of("up", up)
    return torch.ops.bertfast.gated_act(
        *(up, gate, activation_index(activation), float(dropout_p)),
        as_seed(seed, dropout_p, up.device),
    )


def _like(t):
    return torch.empty(t.shape, dtype=t.dtype, device=t.device)


_ARGUMENTS: dict[str, Tensor | Number] = {
    "up": Tensor("tokens, inner", FLOATS),
    "gate": Tensor("tokens, inner", "as up"),
    "activation": ACTIVATION,
    "dropout_p": PROBABILITY,
    "seed": SEED,
}
_GATED_ACT = define(
    "gated_act(Tensor up, Tensor gate, int activation, float dropout_p, Tensor? seed) -> Tensor",
    lambda up, *_: _like(up),
    **_ARGUMENTS,
)
define(
    "gated_act_backward(Tensor grad, Tensor up, Tensor gate, int activation, float dropout_p, "
    "Tensor? seed) -> (Tensor, Tensor)",
    lambda grad, up, gate, *_: (_like(up), _like(gate)),
    **_ARGUMENTS,
    grad=Tensor("tokens, inner", "as up"),
)


def _dropped(x, dropout_p, seed):
    return x if seed is None else dropped(x, dropout_p, seed)


@register("gated_act", "reference")
def _reference(up, gate, activation, dropout_p, seed):
    y = activate(up.to(wide(up.dtype)), activation) * gate
    return _dropped(y, dropout_p, seed).to(up.dtype)


@register("gated_act_backward", "reference")
def _reference_backward(grad, up, gate, activation, dropout_p, seed):
    z = up.to(wide(up.dtype))
    grad = _dropped(grad.to(z.dtype), dropout_p, seed)
    dup, dgate = grad * gate * derivative(z, activation), grad * activate(z, activation)
    return dup.to(up.dtype), dgate.to(up.dtype)


def _arguments(up, gate, activation, dropout_p, seed):
    return (
        *(ptr(up), up.stride(0), ptr(gate), gate.stride(0), *up.shape, activation),
        *(dropout_arguments(dropout_p, seed), is_bf16(up)),
    )


@register("gated_act", "cpu", limit=cpu_limit)
def _cpu(up, gate, activation, dropout_p, seed):
    up, gate, seed, y = dense_last(up), dense_last(gate), dense(seed), _like(up)
    C.gated_act(*_arguments(up, gate, activation, dropout_p, seed), ptr(y))
    return y


@register("gated_act_backward", "cpu", limit=cpu_limit)
def _cpu_backward(grad, up, gate, activation, dropout_p, seed):
    grad, up, gate, seed = dense_last(grad), dense_last(up), dense_last(gate), dense(seed)
    dup, dgate = _like(up), _like(gate)
    C.gated_act_backward(
        *_arguments(up, gate, activation, dropout_p, seed),
        *(ptr(grad), grad.stride(0), ptr(dup), ptr(dgate)),
    )
    return dup, dgate


register_triton("gated_act", "gated_act.gated_act")
register_triton("gated_act_backward", "gated_act.gated_act_backward")


def _setup(ctx, inputs, output):
    up, gate, ctx.activation, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(up, gate, seed)


def _backward(ctx, grad):
    up, gate, seed = ctx.saved_tensors
    dup, dgate = torch.ops.bertfast.gated_act_backward(
        grad, up, gate, ctx.activation, ctx.dropout_p, seed
    )
    return dup, dgate, None, None, None


autograd("gated_act", _backward, _setup)
