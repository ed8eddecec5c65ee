"""`ops.linear_act` and `ops.qkv_linear`.

Few tokens in half precision: csrc/cuda/linear.cu, all in one launch, or two where k is shared out
among thread blocks. Else torch's products, csrc/cuda/linear_act.cu around them: cuBLASLt adds the
bias in the product's epilogue, in fp32 and at no cost; its GELU is the tanh form only, so the
activation is a kernel of its own.
"""

from functools import partial

import torch

from ..extension import C
from ..library import cuda_float_limit, cuda_queue, ptr
from ..linear_act import _DB, _DW, _DX, _WIDE, ACTIVATIONS
from ..registry import register
from .arguments import HALVES, dtype_code, parameter, row_blocks

FEW_TOKENS = 512  # up to these linear.cu takes the product; where it should end is unmeasured


def _linear(x, weight, bias, out=None):
    """x @ weight.T + bias in x's dtype; parameters in fp32 beside a low-precision x are cast."""
    weight = weight.to(x.dtype).T
    if bias is None:
        return torch.mm(x, weight, out=out)
    return torch.addmm(bias.to(x.dtype), x, weight, out=out)


def _takes(x, weights):
    """Whether linear.cu serves: few tokens in half precision, rows of whole 16-byte pieces."""
    return (
        x.dtype in HALVES
        and 0 < x.shape[0] <= FEW_TOKENS
        and x.shape[1] > 0
        and x.shape[1] % 8 == 0
        and all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in (x, *weights))
    )


def _few(x, weights, biases, activation=0, save=False):
    """activation(x @ weight.T + bias) of weights alike in size, side by side, and if `save` what
    the activation got."""
    parts, (m, k), n = len(weights), x.shape, weights[0].shape[0]
    y = torch.empty((m, parts * n), dtype=x.dtype, device=x.device)
    z = torch.empty(y.shape, dtype=x.dtype, device=x.device) if save else None
    splits = C.cuda_linear_splits(m, n, k, parts)
    partial = torch.empty((splits, *y.shape), device=x.device) if splits > 1 else None
    biases = [b if b is None else b.contiguous() for b in biases]
    unused = [0] * (3 - parts)
    C.cuda_linear(
        *(dtype_code(x), ptr(x), m, n, k, parts, *map(ptr, weights), *unused),
        *(*map(ptr, biases), *unused, parameter(biases[0])[1], activation),
        *(ptr(y), ptr(z), ptr(partial), *cuda_queue(x)),
    )
    return y, z


def _limit(position, device, dtype, arguments):
    """position: of the activation among the arguments."""
    if ACTIVATIONS.index("silu") in arguments[position : position + 1]:
        return "it has no silu"
    return cuda_float_limit(device, dtype, arguments)


@register("linear_act", "cuda", limit=partial(_limit, 3))
def _forward(x, weight, bias, activation, save):
    nothing = torch.empty(0, dtype=x.dtype, device=x.device)
    cast = weight.to(x.dtype)
    if _takes(x, (cast,)):
        y, z = _few(x, (cast,), (bias,), activation, save)
        return y, z if save else nothing
    z = _linear(x, cast, bias)
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


def _weight_gradient(grad, x, dtype):
    if dtype == x.dtype or not (x.is_cuda and x.numel()):
        return (grad.T @ x).to(dtype)
    return torch.mm(grad.T, x, out_dtype=dtype)


def _products(grad, x, weight, need):
    """The gradients of x and weight that `need` asks for; empty the others."""
    dx = dw = None
    if need & _DX:
        dx = grad @ weight.to(x.dtype)
    if need & _DW:
        dw = _weight_gradient(grad, x, torch.float32 if need & _WIDE else weight.dtype)
    return (
        torch.empty(0, dtype=x.dtype, device=x.device) if dx is None else dx,
        torch.empty(0, dtype=weight.dtype, device=x.device) if dw is None else dw,
    )


@register("linear_act_backward", "cuda", limit=partial(_limit, 5))
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
    weights = [w.to(x.dtype) for w in (wq, wk, wv)]
    if _takes(x, weights):
        return _few(x, weights, (bq, bk, bv))[0]
    y = torch.empty((x.shape[0], 3 * wq.shape[0]), dtype=x.dtype, device=x.device)
    for part, w, b in zip(y.chunk(3, 1), weights, (bq, bk, bv), strict=True):
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
        dws.append(_products(g, x, w, need & (_DW | _WIDE))[1])
    if not need & _DB:
        return dx, *dws, *(torch.empty(0, dtype=bias_dtype, device=x.device) for _ in range(3))
    _, db = _activation_backward(grad.contiguous(), None, 0)
    return dx, *dws, *(b.to(bias_dtype, copy=True) for b in db.chunk(3))
