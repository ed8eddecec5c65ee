"""`ops.linear_act` and `ops.qkv_linear`: torch's products, csrc/cuda/linear_act.cu around them.

cuBLASLt adds the bias in the product's epilogue, in fp32 and at no cost; its GELU is the tanh form
only, so the activation is a kernel of its own.
"""

import torch

from ..extension import C
from ..library import cuda_float_limit, cuda_queue, ptr
from ..linear_act import _DB, _DW, _DX
from ..registry import register
from .arguments import dtype_code, row_blocks


def _linear(x, weight, bias, out=None):
    """x @ weight.T + bias in x's dtype; parameters in fp32 beside a low-precision x are cast."""
    weight = weight.to(x.dtype).T
    if bias is None:
        return torch.mm(x, weight, out=out)
    return torch.addmm(bias.to(x.dtype), x, weight, out=out)


@register("linear_act", "cuda", limit=cuda_float_limit)
def _forward(x, weight, bias, activation, save):
    z = _linear(x, weight, bias)
    nothing = torch.empty(0, dtype=x.dtype, device=x.device)
    if not activation:
        return z, nothing
    y = torch.empty(z.shape, dtype=z.dtype, device=z.device) if save else z
    C.cuda_activate(dtype_code(z), ptr(z), ptr(y), z.numel(), activation, *cuda_queue(z))
    return y, z if save else nothing


def _activation_backward(grad, z, activation):
    """grad * activation'(z) and its sum over rows, fp32; without activation, grad itself."""
    dz = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device) if activation else grad
    blocks = row_blocks(grad.shape[0])
    partial = torch.empty((blocks, grad.shape[1]), device=grad.device)
    column_sum = torch.empty(grad.shape[1], device=grad.device)
    C.cuda_activation_backward(
        *(dtype_code(grad), ptr(grad), ptr(z), ptr(dz), *grad.shape, activation),
        *(ptr(partial), blocks, ptr(column_sum), *cuda_queue(grad)),
    )
    return dz, column_sum


def _products(grad, x, weight, need):
    """The gradients of x and weight that `need` asks for; empty the others."""
    dx = dw = None
    if need & _DX:
        dx = grad @ weight.to(x.dtype)
    if need & _DW:
        dw = (grad.T @ x).to(weight.dtype)
    return (
        torch.empty(0, dtype=x.dtype, device=x.device) if dx is None else dx,
        torch.empty(0, dtype=weight.dtype, device=x.device) if dw is None else dw,
    )


@register("linear_act_backward", "cuda", limit=cuda_float_limit)
def _backward(grad, x, weight, bias, z, activation, need):
    bias_dtype = (weight if bias is None else bias).dtype
    grad, db = grad.contiguous(), None
    if activation:
        z = _linear(x, weight, bias) if z is None else z.contiguous()
    if activation or need & _DB:
        grad, db = _activation_backward(grad, z, activation)
    dx, dw = _products(grad, x, weight, need)
    if not need & _DB:
        return dx, dw, torch.empty(0, dtype=bias_dtype, device=x.device)
    return dx, dw, db.to(bias_dtype)


@register("qkv_linear", "cuda", limit=cuda_float_limit)
def _qkv_forward(x, wq, bq, wk, bk, wv, bv):
    y = torch.empty((x.shape[0], 3 * wq.shape[0]), dtype=x.dtype, device=x.device)
    for part, w, b in zip(y.chunk(3, 1), (wq, wk, wv), (bq, bk, bv), strict=True):
        _linear(x, w, b, out=part)
    return y


@register("qkv_linear_backward", "cuda", limit=cuda_float_limit)
def _qkv_backward(grad, x, wq, wk, wv, bq, need):
    bias_dtype = (wq if bq is None else bq).dtype
    parts, weights = grad.chunk(3, 1), (wq, wk, wv)
    dx, dws = torch.empty(0, dtype=x.dtype, device=x.device), []
    if need & _DX:
        dx = grad @ torch.cat(weights).to(x.dtype)
    for g, w in zip(parts, weights, strict=True):
        dws.append(_products(g, x, w, need & _DW)[1])
    if not need & _DB:
        return dx, *dws, *(torch.empty(0, dtype=bias_dtype, device=x.device) for _ in range(3))
    _, db = _activation_backward(grad.contiguous(), None, 0)
    return dx, *dws, *(b.to(bias_dtype, copy=True) for b in db.chunk(3))
