"""Linear layers with the activation in the product's epilogue, and the feed-forward block.

GELU: Hendrycks & Gimpel, arXiv:1606.08415; "gelu" is x * Phi(x) with the error function, as BERT
checkpoints need, "gelu_tanh" its tanh approximation. SiLU, x * sigmoid(x): the same paper.
"""

import math

import torch

from .declare import FLOATS, Number, Tensor
from .extension import C
from .library import autograd, check, cpu_limit, define, dense, is_bf16, ptr, register_triton, wide
from .registry import register

ACTIVATIONS = (None, "gelu", "gelu_tanh", "relu", "silu")  # an operator passes the index
_DX, _DW, _DB = 1, 2, 4  # which gradients a backward is asked for
_WIDE = 8  # of a GPU's backward: weights' gradients in fp32, whatever the weights are


def linear_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """activation(x @ weight.T + bias).

    Args:
        x: [..., in].
        weight: [out, in], x's dtype, or fp32 beside bf16 x (mixed precision without a cast copy).
        bias: [out] or None, like weight.
        activation: None, "gelu" (erf), "gelu_tanh", "relu" or "silu".

    Returns: [..., out] in x's dtype; products accumulate in fp32.

    Raises: ValueError or TypeError for arguments that don't fit together.
    """
    index = activation_index(activation)
    save = activation is not None and torch.is_grad_enabled() and needs_grad(x, weight, bias)
    flat = isinstance(x, torch.Tensor) and 1 <= x.dim() != 2
    y = torch.ops.bertfast.linear_act(
        *(x.unsqueeze(0).flatten(0, -2) if flat else x, weight, bias, index, save)
    )[0]
    return y.reshape(*x.shape[:-1], y.shape[1]) if flat else y


def feed_forward(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    activation: str = "gelu",
) -> torch.Tensor:
    """activation(x @ w1.T + b1) @ w2.T + b2: x [..., hidden], w1 [inner, hidden],
    w2 [hidden, inner]; b1 and b2 may be None. See `linear_act`."""
    return linear_act(linear_act(x, w1, b1, activation), w2, b2)


def qkv_linear(
    x: torch.Tensor,
    wq: torch.Tensor,
    bq: torch.Tensor | None,
    wk: torch.Tensor,
    bk: torch.Tensor | None,
    wv: torch.Tensor,
    bv: torch.Tensor | None,
) -> torch.Tensor:
    """The query, key and value projections as one product, from the weights where they are.

    x [tokens, in], each weight [out, in], each bias [out] (all or none) -> [tokens, 3 * out].
    Raises ValueError or TypeError as `linear_act`.
    """
    return torch.ops.bertfast.qkv_linear(x, wq, bq, wk, bk, wv, bv)


def activation_index(activation: str | None) -> int:
    """Of a name in `ACTIVATIONS`: what an operator passes."""
    check(
        activation in ACTIVATIONS,
        lambda: f"activation is {activation!r}, expected one of {ACTIVATIONS}",
    )
    return ACTIVATIONS.index(activation)


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    return any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors)


def _empty(x, *shape):
    return x.new_empty(shape)


def _fake(x, weight, bias, activation, save):
    y = _empty(x, x.shape[0], weight.shape[0])
    return y, _empty(x, *y.shape) if save else _empty(x, 0)


def _fake_backward(grad, x, weight, bias, z, activation, need):
    return (
        _empty(x, *x.shape) if need & _DX else _empty(x, 0),
        _empty(weight, *weight.shape) if need & _DW else _empty(weight, 0),
        _empty(weight if bias is None else bias, weight.shape[0] if need & _DB else 0),
    )


ACTIVATION = Number(0, len(ACTIVATIONS))
_LINEAR: dict[str, Tensor | Number] = {
    "x": Tensor("rows, in", FLOATS),
    "weight": Tensor("out, in", "as x or float32"),
    "bias": Tensor("out", "as x or float32"),
    "activation": ACTIVATION,
}
define(
    "linear_act(Tensor x, Tensor weight, Tensor? bias, int activation, bool save) "
    "-> (Tensor, Tensor)",
    _fake,
    **_LINEAR,
)
define(
    "linear_act_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? z, "
    "int activation, int need) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
    **_LINEAR,
    grad=Tensor("rows, out", "as x"),
    z=Tensor("rows, out", "as x"),
)
_QKV: dict[str, Tensor | Number] = {
    "x": Tensor("tokens, in", FLOATS),
    "wq": Tensor("out, in", "as x or float32"),
    "wk": Tensor("out, in", "as wq"),
    "wv": Tensor("out, in", "as wq"),
    "bq": Tensor("out", "as x or float32"),
}
define(
    "qkv_linear(Tensor x, Tensor wq, Tensor? bq, Tensor wk, Tensor? bk, Tensor wv, Tensor? bv) "
    "-> Tensor",
    lambda x, wq, bq, wk, bk, wv, bv: _empty(x, x.shape[0], 3 * wq.shape[0]),
    **_QKV,
    bk=Tensor("out", "as bq", beside="bq"),
    bv=Tensor("out", "as bq", beside="bq"),
)


def _fake_qkv_backward(grad, x, wq, wk, wv, bq, need):
    bias = wq if bq is None else bq
    return (
        _empty(x, *x.shape) if need & _DX else _empty(x, 0),
        *(_empty(w, *w.shape) if need & _DW else _empty(w, 0) for w in (wq, wk, wv)),
        *(_empty(bias, wq.shape[0] if need & _DB else 0) for _ in range(3)),
    )


define(
    "qkv_linear_backward(Tensor grad, Tensor x, Tensor wq, Tensor wk, Tensor wv, Tensor? bq, "
    "int need) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_qkv_backward,
    **_QKV,
    grad=Tensor("tokens, 3 * out", "as x"),
)


# --- reference ---


def activate(z: torch.Tensor, activation: int) -> torch.Tensor:
    """activation(z) of an index in `ACTIVATIONS`, by plain PyTorch."""
    if activation in (1, 2, 4):
        z = torch.where(z == -math.inf, -1e9, z)  # the limit 0, not -inf * 0
    if activation == 1:
        return 0.5 * z * (1 + torch.erf(z * math.sqrt(0.5)))
    if activation == 2:
        return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    if activation == 4:
        return z * torch.sigmoid(z)
    return torch.where(z < 0, 0, z) if activation == 3 else z


def derivative(z: torch.Tensor, activation: int) -> torch.Tensor:
    """activation'(z)."""
    if activation == 1:
        density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(z * math.sqrt(0.5))) + z * density
    if activation == 2:
        c = math.sqrt(2 / math.pi)
        t = torch.tanh(c * (z + 0.044715 * z**3))
        return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * c * (1 + 3 * 0.044715 * z * z)
    if activation == 4:
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))
    return (z > 0).to(z.dtype) if activation else torch.ones_like(z)


def _matmul(x, weight, bias):
    z = x.to(wide(x.dtype)) @ weight.to(wide(x.dtype)).T
    return z if bias is None else z + bias


@register("linear_act", "reference")
def _reference(x, weight, bias, activation, save):
    z = _matmul(x, weight, bias)
    y = activate(z, activation).to(x.dtype)
    return y, z.to(x.dtype, copy=True) if save else _empty(x, 0)


@register("linear_act_backward", "reference")
def _reference_backward(grad, x, weight, bias, z, activation, need):
    grad, bias_dtype = grad.to(wide(x.dtype)), (weight if bias is None else bias).dtype
    if activation:
        z = _matmul(x, weight, bias) if z is None else z
        grad = grad * derivative(z.to(grad.dtype), activation)
    return (
        (grad @ weight.to(grad.dtype)).to(x.dtype) if need & _DX else _empty(x, 0),
        (grad.T @ x.to(grad.dtype)).to(weight.dtype) if need & _DW else _empty(weight, 0),
        grad.sum(0).to(bias_dtype) if need & _DB else weight.new_empty(0, dtype=bias_dtype),
    )


@register("qkv_linear", "reference")
def _qkv_reference(x, wq, bq, wk, bk, wv, bv):
    return torch.cat([_matmul(x, *p) for p in ((wq, bq), (wk, bk), (wv, bv))], 1).to(x.dtype)


@register("qkv_linear_backward", "reference")
def _qkv_reference_backward(grad, x, wq, wk, wv, bq, need):
    grads = [
        _reference_backward(g, x, w, bq, None, 0, need & ~_DX)
        for g, w in zip(grad.chunk(3, 1), (wq, wk, wv), strict=True)
    ]
    weight = torch.cat([wq, wk, wv]).to(wide(x.dtype))
    dx = (grad.to(weight.dtype) @ weight).to(x.dtype) if need & _DX else _empty(x, 0)
    return dx, *(g[1] for g in grads), *(g[2] for g in grads)


# --- C++ CPU kernels ---


def _gemm(
    a,
    b,
    c,
    bias=(None,),
    z=None,
    activation=0,
    a_t=False,
    b_t=True,
    split_k=False,
    accumulate=False,
):
    """c[m, n] = activation(a @ b.T + bias), a.T if a_t, b for b.T unless b_t.

    b and bias are tuples: parts stacked along n, or along k if split_k; z takes the
    pre-activation; accumulate adds what c held before the activation. Everything 2-D with any
    strides, but c and z with a dense last dimension.
    """
    k, m = a.shape if a_t else a.shape[::-1]
    a_strides = a.stride()[::-1] if a_t else a.stride()
    b_strides = b[0].stride() if b_t else b[0].stride()[::-1]
    C.gemm(
        *(m, c.shape[1], k, ptr(a), *a_strides, is_bf16(a)),
        *([ptr(p) for p in b], *b_strides, is_bf16(b[0]), split_k),
        *([ptr(p) for p in bias if p is not None], is_bf16(bias[0])),
        *(ptr(c), c.stride(0), is_bf16(c), ptr(z), activation, accumulate),
    )


def _common_strides(*tensors):
    """The tensors as they are where all have the same strides, else dense."""
    if any(t.stride() != tensors[0].stride() for t in tensors):
        return tuple(t.contiguous() for t in tensors)
    return tensors


@register("linear_act", "cpu", limit=cpu_limit)
def _cpu(x, weight, bias, activation, save):
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype)
    z = torch.empty(y.shape if save else (0,), dtype=x.dtype)
    _gemm(x, (weight,), y, (dense(bias),), z if save else None, activation)
    return y, z


def _column_sum(grad):
    out = torch.empty(grad.shape[1])
    C.activation_backward(
        *(ptr(grad), grad.stride(0), 0, 0, ptr(out), *grad.shape, is_bf16(grad), 0)
    )
    return out


@register("linear_act_backward", "cpu", limit=cpu_limit)
def _cpu_backward(grad, x, weight, bias, z, activation, need):
    bias_dtype = (weight if bias is None else bias).dtype
    db = None
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    if activation:
        if z is None:
            z = torch.empty(grad.shape, dtype=x.dtype)
            _gemm(x, (weight,), z, (dense(bias),))
        grad, z = grad.contiguous(), z.contiguous()
        dz, db = torch.empty(grad.shape, dtype=x.dtype), torch.empty(grad.shape[1])
        C.activation_backward(
            *(ptr(grad), grad.stride(0), ptr(z), ptr(dz), ptr(db), *grad.shape),
            *(is_bf16(grad), activation),
        )
        grad = dz
    elif need & _DB:
        db = _column_sum(grad)
    dx = torch.empty(x.shape if need & _DX else (0,), dtype=x.dtype)
    dw = torch.empty(weight.shape if need & _DW else (0,), dtype=weight.dtype)
    if need & _DX:
        _gemm(grad, (weight,), dx, b_t=False)
    if need & _DW:
        _gemm(grad, (x,), dw, a_t=True, b_t=False)
    return dx, dw, db.to(bias_dtype) if need & _DB else torch.empty(0, dtype=bias_dtype)


@register("qkv_linear", "cpu", limit=cpu_limit)
def _qkv_cpu(x, wq, bq, wk, bk, wv, bv):
    y = torch.empty((x.shape[0], 3 * wq.shape[0]), dtype=x.dtype)
    _gemm(x, _common_strides(wq, wk, wv), y, (dense(bq), dense(bk), dense(bv)))
    return y


@register("qkv_linear_backward", "cpu", limit=cpu_limit)
def _qkv_cpu_backward(grad, x, wq, wk, wv, bq, need):
    bias_dtype = (wq if bq is None else bq).dtype
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    dx = torch.empty(x.shape if need & _DX else (0,), dtype=x.dtype)
    if need & _DX:
        _gemm(grad, _common_strides(wq, wk, wv), dx, b_t=False, split_k=True)
    dws = tuple(torch.empty(w.shape if need & _DW else (0,), dtype=w.dtype) for w in (wq, wk, wv))
    if need & _DW:
        for g, dw in zip(grad.chunk(3, 1), dws, strict=True):
            _gemm(g, (x,), dw, a_t=True, b_t=False)
    if not need & _DB:
        return dx, *dws, *(torch.empty(0, dtype=bias_dtype) for _ in range(3))
    return dx, *dws, *(b.to(bias_dtype, copy=True) for b in _column_sum(grad).chunk(3))


# --- Triton kernels ---

for _name in ("linear_act", "linear_act_backward", "qkv_linear", "qkv_linear_backward"):
    register_triton(_name, f"linear_act.{_name}")


# --- autograd ---


def _setup(ctx, inputs, output):
    x, weight, bias, ctx.activation, save = inputs
    ctx.save_for_backward(x, weight, bias, output[1] if save else None)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _need(ctx, x, weight, bias):
    needs = ctx.needs_input_grad
    return _DX * needs[x] | _DW * any(needs[i] for i in weight) | _DB * any(needs[i] for i in bias)


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 5
    need = _need(ctx, 0, (1,), (2,))
    x, weight, bias, z = ctx.saved_tensors
    dx, dw, db = torch.ops.bertfast.linear_act_backward(
        grad, x, weight, bias, z, ctx.activation, need
    )
    return (
        dx if need & _DX else None,
        dw if need & _DW else None,
        db if need & _DB else None,
        None,
        None,
    )


def _qkv_setup(ctx, inputs, output):
    x, wq, bq, wk, _, wv, _ = inputs
    ctx.save_for_backward(x, wq, wk, wv, bq)


def _qkv_backward(ctx, grad):
    need = _need(ctx, 0, (1, 3, 5), (2, 4, 6))
    grads = torch.ops.bertfast.qkv_linear_backward(grad, *ctx.saved_tensors, need)
    dx, dq, dk, dv, dbq, dbk, dbv = grads
    grads = dx, dq, dbq, dk, dbk, dv, dbv
    return tuple(g if n else None for g, n in zip(grads, ctx.needs_input_grad, strict=True))


autograd("linear_act", _backward, _setup)
autograd("qkv_linear", _qkv_backward, _qkv_setup)
