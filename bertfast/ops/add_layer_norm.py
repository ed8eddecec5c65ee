"""LN(residual + dropout(x + x_bias)) in one pass (Ba, Kiros & Hinton, arXiv:1607.06450); RMS norm
(Zhang & Sennrich, arXiv:1910.07467) or no norm in LN's place."""

import torch

from .declare import FLOATS, PROBABILITY, SEED, Number, Tensor
from .dropout import as_seed, dropout_arguments, keep_mask
from .extension import C
from .library import (
    autograd,
    cpu_limit,
    define,
    dense,
    is_bf16,
    ptr,
    register_triton,
    triton_row_limit,
    wide,
)
from .registry import register


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    *,
    x_bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    rms: bool = False,
) -> torch.Tensor:
    """LN(residual + dropout(x + x_bias)) over the last dimension, statistics in fp32.

    Args:
        x, residual: [tokens, hidden], one dtype; residual may be None.
        weight, bias, x_bias: [hidden], x's dtype or fp32; bias and x_bias may be None. Without a
            weight there is no norm: residual + dropout(x + x_bias).
        eps: added to the variance, of RMS norm to the mean square.
        dropout_p, seed: see `ops.dropout`; row = token, column = hidden index.
        rms: RMS norm: s / sqrt(mean(s^2) + eps) * weight, no mean taken off.

    Returns: [tokens, hidden] in x's dtype.

    Raises: ValueError or TypeError for arguments that don't fit together.
    """
    _ADD_LAYER_NORM.shape_of("x", x)
    seed = as_seed(seed, dropout_p, x.device)
    return torch.ops.bertfast.add_layer_norm(
        x, residual, weight, bias, float(eps), x_bias, float(dropout_p), seed, rms
    )[0]


def statistics_of(
    x: torch.Tensor, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """mean and rstd to be filled, fp32 [tokens] each; [0] without a norm."""
    n = 0 if weight is None else x.shape[0]
    return tuple(torch.empty(n, dtype=wide(x.dtype), device=x.device) for _ in range(2))


def _fake(x, residual, weight, bias, eps, x_bias, dropout_p, seed, rms):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, *statistics_of(x, weight)


def two_gradients(residual: torch.Tensor | None, seed: torch.Tensor | None) -> bool:
    """Whether backward has two gradients: without dropout residual's is x's, and ds is empty."""
    return residual is not None and seed is not None


def _fake_backward(grad, x, residual, weight, mean, rstd, x_bias, dropout_p, seed, rms):
    def like(t):
        if t is None:
            return x.new_empty(0)
        return torch.empty_like(t, memory_format=torch.contiguous_format)

    ds = like(x if two_gradients(residual, seed) else None)
    return like(x), ds, like(weight), like(weight), like(x_bias)


_ARGUMENTS: dict[str, Tensor | Number] = {
    "x": Tensor("tokens, hidden", FLOATS),
    "residual": Tensor("tokens, hidden", "as x"),
    "weight": Tensor("hidden", "as x or float32"),
    "x_bias": Tensor("hidden", "as x or float32"),
    "dropout_p": PROBABILITY,
    "seed": SEED,
    "rms": Number(0, 2, needs="weight"),
}
_ADD_LAYER_NORM = define(
    "add_layer_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, "
    "Tensor? x_bias, float dropout_p, Tensor? seed, bool rms) -> (Tensor, Tensor, Tensor)",
    _fake,
    **_ARGUMENTS,
    bias=Tensor("hidden", "as x or float32", needs="weight"),
)
define(
    "add_layer_norm_backward(Tensor grad, Tensor x, Tensor? residual, Tensor? weight, "
    "Tensor? mean, Tensor? rstd, Tensor? x_bias, float dropout_p, Tensor? seed, bool rms) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
    **_ARGUMENTS,
    grad=Tensor("tokens, hidden", "as x"),
    mean=Tensor("tokens", "statistics of x", beside="weight"),
    rstd=Tensor("tokens", "statistics of x", beside="weight"),
)


def _keep(x, dropout_p, seed):
    rows = torch.arange(x.shape[0], device=x.device)
    return keep_mask(seed, rows, x.shape[1], dropout_p)


def _sum(x, residual, x_bias, dropout_p, seed):
    """residual + dropout(x + x_bias) in wide arithmetic."""
    s = x.to(wide(x.dtype))
    if x_bias is not None:
        s = s + x_bias
    if seed is not None:
        s = torch.where(_keep(x, dropout_p, seed), s / (1 - dropout_p), 0)
    return s if residual is None else s + residual


def centre(s: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """s - mean [tokens]; then less what the mean's rounding left, which the mean's size decides."""
    s = s - mean[:, None]
    return s - s.mean(1, keepdim=True)


@register("add_layer_norm", "reference")
def _reference(x, residual, weight, bias, eps, x_bias, dropout_p, seed, rms):
    s = _sum(x, residual, x_bias, dropout_p, seed)
    if weight is None:
        return s.to(x.dtype, copy=True), *statistics_of(x, None)
    mean = s.new_zeros(s.shape[0]) if rms else s.mean(1)
    centred = s if rms else centre(s, mean)
    rstd = torch.rsqrt(centred.square().mean(1) + eps)
    y = centred * rstd[:, None] * weight
    return (y if bias is None else y + bias).to(x.dtype), mean, rstd


def _norm_backward(grad, s, weight, mean, rstd, rms):
    """The gradients of s, weight and bias."""
    normed = (s if rms else centre(s, mean)) * rstd[:, None]
    scaled = grad * weight
    ds = scaled - normed * (scaled * normed).mean(1, keepdim=True)
    ds = ds if rms else ds - scaled.mean(1, keepdim=True)
    dw, db = (grad * normed).sum(0), grad.sum(0)
    return ds * rstd[:, None], dw.to(weight.dtype), db.to(weight.dtype)


@register("add_layer_norm_backward", "reference")
def _reference_backward(grad, x, residual, weight, mean, rstd, x_bias, dropout_p, seed, rms):
    ds = grad.to(wide(x.dtype))
    dw, db = x.new_empty(0), x.new_empty(0)
    if weight is not None:
        s = _sum(x, residual, x_bias, dropout_p, seed)
        ds, dw, db = _norm_backward(ds, s, weight, mean, rstd, rms)
    dx = ds if seed is None else torch.where(_keep(x, dropout_p, seed), ds / (1 - dropout_p), 0)
    ds = ds.to(x.dtype, copy=True) if two_gradients(residual, seed) else x.new_empty(0)
    dx_bias = x.new_empty(0) if x_bias is None else dx.sum(0).to(x_bias.dtype)
    return dx.to(x.dtype, copy=True), ds, dw, db, dx_bias


def _arguments(x, residual, weight, x_bias, dropout_p, seed, mean, rstd, rms):
    return (
        *(ptr(x), ptr(residual), ptr(weight), ptr(x_bias), dropout_arguments(dropout_p, seed)),
        *(ptr(mean), ptr(rstd), *x.shape, is_bf16(x), is_bf16(weight), is_bf16(x_bias), rms),
    )


@register("add_layer_norm", "cpu", limit=cpu_limit)
def _cpu(x, residual, weight, bias, eps, x_bias, dropout_p, seed, rms):
    x, residual, x_bias = dense(x), dense(residual), dense(x_bias)
    weight, bias, seed = dense(weight), dense(bias), dense(seed)
    y = torch.empty(x.shape, dtype=x.dtype)
    mean, rstd = statistics_of(x, weight)
    C.add_layer_norm(
        *_arguments(x, residual, weight, x_bias, dropout_p, seed, mean, rstd, rms),
        *(ptr(bias), is_bf16(bias), eps, ptr(y)),
    )
    return y, mean, rstd


@register("add_layer_norm_backward", "cpu", limit=cpu_limit)
def _cpu_backward(grad, x, residual, weight, mean, rstd, x_bias, dropout_p, seed, rms):
    tokens, hidden = x.shape
    grad, x, residual, x_bias = dense(grad), dense(x), dense(residual), dense(x_bias)
    weight, seed, mean, rstd = dense(weight), dense(seed), dense(mean), dense(rstd)
    dx = torch.empty((tokens, hidden), dtype=x.dtype)
    ds = torch.empty((tokens, hidden) if two_gradients(residual, seed) else 0, dtype=x.dtype)
    columns = torch.empty((3, hidden))  # dweight, dbias, dx_bias
    C.add_layer_norm_backward(
        *_arguments(x, residual, weight, x_bias, dropout_p, seed, mean, rstd, rms),
        *(ptr(grad), ptr(dx), ptr(ds) if ds.numel() else 0, ptr(columns)),
    )
    vectors = zip(columns, (weight, weight, x_bias), strict=True)
    none = torch.empty(0, dtype=x.dtype)
    return dx, ds, *(none.clone() if p is None else c.to(p.dtype, copy=True) for c, p in vectors)


register_triton("add_layer_norm", "add_layer_norm.add_layer_norm", triton_row_limit)
register_triton(
    "add_layer_norm_backward", "add_layer_norm.add_layer_norm_backward", triton_row_limit
)


def _setup(ctx, inputs, output):
    x, residual, weight, bias, _, x_bias, ctx.dropout_p, seed, ctx.rms = inputs
    ctx.bias_dtype, ctx.has_residual = None if bias is None else bias.dtype, residual is not None
    # Without a norm backward needs no value of these.
    normed = (x, residual, weight, *output[1:]) if weight is not None else (None,) * 5
    ctx.save_for_backward(*normed, x_bias, seed)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 9
    x, residual, weight, mean, rstd, x_bias, seed = ctx.saved_tensors
    if weight is None:
        x, residual = grad, grad if ctx.has_residual else None
    dx, ds, dw, db, dx_bias = torch.ops.bertfast.add_layer_norm_backward(
        grad, x, residual, weight, mean, rstd, x_bias, ctx.dropout_p, seed, ctx.rms
    )
    return (
        dx,
        None if residual is None else dx if seed is None else ds,
        None if weight is None else dw,
        None if ctx.bias_dtype is None else db.to(ctx.bias_dtype),
        None,
        None if x_bias is None else dx_bias,
        *(None, None, None),
    )


autograd("add_layer_norm", _backward, _setup)
