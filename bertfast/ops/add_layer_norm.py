"""LN(residual + dropout(x + x_bias)) in one pass (Ba, Kiros & Hinton, arXiv:1607.06450)."""

import torch

from .declare import FLOATS, PROBABILITY, SEED, Tensor
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


def add_layer_norm(x, residual, weight, bias, eps, *, x_bias=None, dropout_p=0.0, seed=None):
    """LN(residual + dropout(x + x_bias)) over the last dimension, statistics in fp32.

    Args:
        x, residual: [tokens, hidden], one dtype; residual may be None.
        weight, bias, x_bias: [hidden], x's dtype or fp32; x_bias may be None.
        eps: added to the variance.
        dropout_p, seed: see `ops.dropout`; row = token, column = hidden index.

    Returns: [tokens, hidden] in x's dtype.

    Raises: ValueError or TypeError for arguments that don't fit together.
    """
    _ADD_LAYER_NORM.shape_of("x", x)
    seed = as_seed(seed, dropout_p, x.device)
    return torch.ops.bertfast.add_layer_norm(
        x, residual, weight, bias, float(eps), x_bias, float(dropout_p), seed
    )[0]


def _fake(x, residual, weight, bias, eps, x_bias, dropout_p, seed):
    stats = x.new_empty((x.shape[0],), dtype=wide(x.dtype))
    return torch.empty_like(x, memory_format=torch.contiguous_format), stats, stats.clone()


def two_gradients(residual, seed):
    """Whether backward has two gradients: without dropout residual's is x's, and ds is empty."""
    return residual is not None and seed is not None


def _fake_backward(grad, x, residual, weight, mean, rstd, x_bias, dropout_p, seed):
    def like(t):
        return torch.empty_like(t, memory_format=torch.contiguous_format)

    ds = like(x) if two_gradients(residual, seed) else x.new_empty(0)
    dx_bias = x.new_empty(0) if x_bias is None else like(x_bias)
    return like(x), ds, like(weight), like(weight), dx_bias


_ARGUMENTS = {
    "x": Tensor("tokens, hidden", FLOATS),
    "residual": Tensor("tokens, hidden", "as x"),
    "weight": Tensor("hidden", "as x or float32"),
    "x_bias": Tensor("hidden", "as x or float32"),
    "dropout_p": PROBABILITY,
    "seed": SEED,
}
_ADD_LAYER_NORM = define(
    "add_layer_norm(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps, "
    "Tensor? x_bias, float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor)",
    _fake,
    **_ARGUMENTS,
    bias=Tensor("hidden", "as x or float32"),
)
define(
    "add_layer_norm_backward(Tensor grad, Tensor x, Tensor? residual, Tensor weight, Tensor mean, "
    "Tensor rstd, Tensor? x_bias, float dropout_p, Tensor? seed) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
    **_ARGUMENTS,
    grad=Tensor("tokens, hidden", "as x"),
    mean=Tensor("tokens", "statistics of x"),
    rstd=Tensor("tokens", "statistics of x"),
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


def centre(s, mean):
    """s - mean [tokens]; then less what the mean's rounding left, which the mean's size decides."""
    s = s - mean[:, None]
    return s - s.mean(1, keepdim=True)


@register("add_layer_norm", "reference")
def _reference(x, residual, weight, bias, eps, x_bias, dropout_p, seed):
    s = _sum(x, residual, x_bias, dropout_p, seed)
    mean = s.mean(1)
    centred = centre(s, mean)
    rstd = torch.rsqrt(centred.square().mean(1) + eps)
    y = centred * rstd[:, None] * weight + bias
    return y.to(x.dtype), mean, rstd


@register("add_layer_norm_backward", "reference")
def _reference_backward(grad, x, residual, weight, mean, rstd, x_bias, dropout_p, seed):
    s = _sum(x, residual, x_bias, dropout_p, seed)
    grad = grad.to(s.dtype)
    normed = centre(s, mean) * rstd[:, None]
    scaled = grad * weight
    ds = scaled - scaled.mean(1, keepdim=True) - normed * (scaled * normed).mean(1, keepdim=True)
    ds = ds * rstd[:, None]
    dx = ds if seed is None else torch.where(_keep(x, dropout_p, seed), ds / (1 - dropout_p), 0)
    dw, db = (grad * normed).sum(0), grad.sum(0)
    ds = ds.to(x.dtype) if two_gradients(residual, seed) else x.new_empty(0)
    dx_bias = x.new_empty(0) if x_bias is None else dx.sum(0).to(x_bias.dtype)
    return dx.to(x.dtype), ds, dw.to(weight.dtype), db.to(weight.dtype), dx_bias


def _arguments(x, residual, weight, x_bias, dropout_p, seed, mean, rstd):
    return (
        *(ptr(x), ptr(residual), ptr(weight), ptr(x_bias), dropout_arguments(dropout_p, seed)),
        *(ptr(mean), ptr(rstd), *x.shape, is_bf16(x), is_bf16(weight), is_bf16(x_bias)),
    )


@register("add_layer_norm", "cpu", limit=cpu_limit)
def _cpu(x, residual, weight, bias, eps, x_bias, dropout_p, seed):
    tokens, hidden = x.shape
    x, residual, x_bias = dense(x), dense(residual), dense(x_bias)
    weight, bias, seed = dense(weight), dense(bias), dense(seed)
    y = torch.empty((tokens, hidden), dtype=x.dtype)
    mean, rstd = torch.empty(tokens), torch.empty(tokens)
    C.add_layer_norm(
        *_arguments(x, residual, weight, x_bias, dropout_p, seed, mean, rstd),
        *(ptr(bias), is_bf16(bias), eps, ptr(y)),
    )
    return y, mean, rstd


@register("add_layer_norm_backward", "cpu", limit=cpu_limit)
def _cpu_backward(grad, x, residual, weight, mean, rstd, x_bias, dropout_p, seed):
    tokens, hidden = x.shape
    grad, x, residual, x_bias = dense(grad), dense(x), dense(residual), dense(x_bias)
    weight, seed, mean, rstd = dense(weight), dense(seed), dense(mean), dense(rstd)
    dx = torch.empty((tokens, hidden), dtype=x.dtype)
    ds = torch.empty((tokens, hidden) if two_gradients(residual, seed) else 0, dtype=x.dtype)
    columns = torch.empty((3, hidden))  # dweight, dbias, dx_bias
    C.add_layer_norm_backward(
        *_arguments(x, residual, weight, x_bias, dropout_p, seed, mean, rstd),
        *(ptr(grad), ptr(dx), ptr(ds) if ds.numel() else 0, ptr(columns)),
    )
    dw, db, dx_bias = (c.clone() for c in columns)
    dx_bias = torch.empty(0, dtype=x.dtype) if x_bias is None else dx_bias.to(x_bias.dtype)
    return dx, ds, dw.to(weight.dtype), db.to(weight.dtype), dx_bias


register_triton("add_layer_norm", "add_layer_norm.add_layer_norm", triton_row_limit)
register_triton(
    "add_layer_norm_backward", "add_layer_norm.add_layer_norm_backward", triton_row_limit
)


def _setup(ctx, inputs, output):
    x, residual, weight, bias, _, x_bias, ctx.dropout_p, seed = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(x, residual, weight, output[1], output[2], x_bias, seed)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 8
    x, residual, weight, mean, rstd, x_bias, seed = ctx.saved_tensors
    dx, ds, dw, db, dx_bias = torch.ops.bertfast.add_layer_norm_backward(
        grad, x, residual, weight, mean, rstd, x_bias, ctx.dropout_p, seed
    )
    return (
        dx,
        None if residual is None else dx if seed is None else ds,
        dw,
        db.to(ctx.bias_dtype),
        None,
        None if x_bias is None else dx_bias,
        None,
        None,
    )


autograd("add_layer_norm", _backward, _setup)
