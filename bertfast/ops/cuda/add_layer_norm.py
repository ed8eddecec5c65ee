"""`ops.add_layer_norm` on csrc/cuda/add_layer_norm.cu."""

from functools import partial

import torch

from ..add_layer_norm import two_gradients
from ..dropout import dropout_arguments
from ..extension import C
from ..library import cuda_float_limit, cuda_queue, dense, ptr
from ..registry import register
from .arguments import dtype_code, hidden_limit, parameter, row_blocks


def _limit(parameters, device, dtype, arguments):
    """parameters: which of the arguments are the norm's."""
    if any(p is None for p in arguments[parameters]) or (arguments and arguments[-1] is True):
        return "it has layer norm with weight and bias alone"
    return cuda_float_limit(device, dtype, arguments) or hidden_limit(arguments)


@register("add_layer_norm", "cuda", limit=partial(_limit, slice(2, 4)))
def _forward(x, residual, weight, bias, eps, x_bias, dropout_p, seed, rms):
    x, residual, weight, bias, x_bias, seed = map(dense, (x, residual, weight, bias, x_bias, seed))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(x.shape[0], device=x.device) for _ in range(2))
    C.cuda_add_layer_norm(
        *(dtype_code(x), ptr(x), ptr(residual), *parameter(weight), *parameter(bias)),
        *(*parameter(x_bias), *dropout_arguments(dropout_p, seed), eps, *x.shape),
        *(ptr(y), ptr(mean), ptr(rstd), *cuda_queue(x)),
    )
    return y, mean, rstd


@register("add_layer_norm_backward", "cuda", limit=partial(_limit, slice(3, 4)))
def _backward(grad, x, residual, weight, mean, rstd, x_bias, dropout_p, seed, rms):
    grad, x, residual, weight = map(dense, (grad, x, residual, weight))
    mean, rstd, x_bias, seed = map(dense, (mean, rstd, x_bias, seed))
    tokens, hidden = x.shape
    dx, ds = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    blocks = row_blocks(tokens)
    partial = torch.empty((blocks, 3, hidden), device=x.device)
    columns = torch.empty((3, hidden), device=x.device)
    C.cuda_add_layer_norm_backward(
        *(dtype_code(x), ptr(grad), ptr(x), ptr(residual), *parameter(weight)),
        *(
            *parameter(x_bias),
            *dropout_arguments(dropout_p, seed),
            ptr(mean),
            ptr(rstd),
            tokens,
            hidden,
        ),
        *(ptr(dx), ptr(ds), ptr(partial), blocks, ptr(columns), *cuda_queue(x)),
    )
    dw, db, dx_bias = columns
    none = torch.empty(0, dtype=x.dtype, device=x.device)
    return (
        *(dx, ds if two_gradients(residual, seed) else none),
        *(dw.to(weight.dtype, copy=True), db.to(weight.dtype, copy=True)),
        none if x_bias is None else dx_bias.to(x_bias.dtype, copy=True),
    )
