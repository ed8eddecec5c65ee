"""`ops.add_layer_norm` on csrc/cuda/add_layer_norm.cu."""

import torch

from ..extension import C
from ..library import cuda_float_limit, cuda_queue, dense, ptr
from ..registry import register
from .arguments import dropout, dtype_code, parameter, row_blocks

MAX_HIDDEN = 4096  # kMaxHidden in csrc/cuda/rows.h: a row stays in a block's registers


def hidden_limit(hidden, dtypes, *parameters):
    if hidden > MAX_HIDDEN:
        return f"hidden is {hidden}, it takes at most {MAX_HIDDEN}"
    for p in parameters:
        if p is not None and p.dtype not in dtypes:
            return f"a parameter is {p.dtype}, it takes {dtypes[0]} or float32"
    return None


def _limit(device, dtype, arguments):
    why = cuda_float_limit(device, dtype, arguments)
    if why or not arguments:
        return why
    vectors = [a for a in arguments if isinstance(a, torch.Tensor) and a.dim() == 1]
    vectors = [v for v in vectors if v.is_floating_point()]
    return hidden_limit(vectors[0].shape[0], (dtype, torch.float32), *vectors)


@register("add_layer_norm", "cuda", limit=_limit)
def _forward(x, residual, weight, bias, eps, x_bias, dropout_p, seed):
    x, residual, weight, bias, x_bias, seed = map(dense, (x, residual, weight, bias, x_bias, seed))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(x.shape[0], device=x.device) for _ in range(2))
    C.cuda_add_layer_norm(
        *(dtype_code(x), ptr(x), ptr(residual), *parameter(weight), *parameter(bias)),
        *(*parameter(x_bias), *dropout(dropout_p, seed), eps, *x.shape),
        *(ptr(y), ptr(mean), ptr(rstd), *cuda_queue(x)),
    )
    return y, mean, rstd


@register("add_layer_norm_backward", "cuda", limit=_limit)
def _backward(grad, x, residual, weight, mean, rstd, x_bias, dropout_p, seed):
    grad, x, residual, weight = map(dense, (grad, x, residual, weight))
    mean, rstd, x_bias, seed = map(dense, (mean, rstd, x_bias, seed))
    tokens, hidden = x.shape
    dx, ds = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    blocks = row_blocks(tokens)
    partial = torch.empty((blocks, 3, hidden), device=x.device)
    columns = torch.empty((3, hidden), device=x.device)
    C.cuda_add_layer_norm_backward(
        *(dtype_code(x), ptr(grad), ptr(x), ptr(residual), *parameter(weight)),
        *(*parameter(x_bias), *dropout(dropout_p, seed), ptr(mean), ptr(rstd), tokens, hidden),
        *(ptr(dx), ptr(ds), ptr(partial), blocks, ptr(columns), *cuda_queue(x)),
    )
    dw, db, dx_bias = columns
    bias_dtype = x.dtype if x_bias is None else x_bias.dtype
    return (
        *(dx, ds, dw.to(weight.dtype, copy=True), db.to(weight.dtype, copy=True)),
        dx_bias.to(bias_dtype, copy=True),
    )
