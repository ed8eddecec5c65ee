"""The arithmetic of a layer, forward and backward, over whatever kernels it is given.

`k` has the operators' functions by name, all with the schemas' arguments: a backend's own, or the
dispatcher's.
"""

from functools import partial

import torch
from torch.nn import functional as F

from ..ops.attention import default_scale
from ..ops.dropout import as_seed
from ..ops.linear_act import _DB, _DW, _DX, ACTIVATIONS
from .batch import Batch
from .spec import DROPOUTS, Layer, LayerSpec, of_layer
from .weights import LayerWeights

_ACTIVATE = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu}
_QKV = "query", "key", "value"


def seeds_of(layer: Layer, seeds, device) -> list[torch.Tensor | None]:
    """Of its dropouts; None of one that doesn't drop. seeds: int64 [DROPOUTS, 2], or None."""
    seeds = (None,) * DROPOUTS if seeds is None else seeds
    return [as_seed(s, p, device) if p else None for s, p in zip(seeds, layer.dropout, strict=True)]


def each(layers: list[Layer], batch: Batch, one):
    """`one(layer, batch, hidden, seeds, rows)`, layer after layer: [tokens or rows, hidden]."""
    hidden, seeds = batch.hidden, batch.seeds
    seeds = seeds.unbind() if isinstance(seeds, torch.Tensor) else seeds
    for i, layer in enumerate(layers):
        own = None if seeds is None else of_layer(seeds, i)
        rows = batch.rows if i + 1 == len(layers) else None
        hidden = one(layer, batch, hidden, own, rows)
    return hidden


def picked(rows, *tensors):
    return tensors if rows is None else [t.index_select(0, rows) for t in tensors]


def _product(k, layer: Layer, role: str, x, biased: bool = True):
    """[n, in] -> [n, out] by a role's linear layer, or the adapter over it, which adds its bias."""
    weight, bias = getattr(layer.weights, role)
    if role in layer.adapters:
        return layer.adapters[role](x).to(x.dtype)
    return k.linear_act(x, weight, bias if biased else None, 0, False)[0]


def _unbiased(k, layer: Layer, role: str, x):
    """The same, and the bias that is left to add where the dropout and the residual are."""
    bias = None if role in layer.adapters else getattr(layer.weights, role).bias
    return _product(k, layer, role, x, False), bias


def _qkv(k, layer: Layer, hidden):
    """[tokens, 3, heads, head_dim]"""
    spec, w = layer.spec, layer.weights
    if any([role in layer.adapters for role in _QKV]):
        qkv = torch.stack([_product(k, layer, role, hidden) for role in _QKV], 1)
    else:
        qkv = k.qkv_linear(hidden, *w.query, *w.key, *w.value)
    return qkv.view(hidden.shape[0], 3, spec.heads, spec.head_dim)


def _inner(k, layer: Layer, x, save: bool):
    """[n, inner], and what `linear_act` saves."""
    activation = layer.spec.activation
    if "up" in layer.adapters:
        return _ACTIVATE[activation](_product(k, layer, "up", x)), None
    return k.linear_act(x, *layer.weights.up, ACTIVATIONS.index(activation), save)


def forward(k, layer: Layer, batch: Batch, hidden, seeds, rows, save: bool):
    """One layer on packed tokens.

    Args:
        batch: the sequences, and the attention's bias.
        hidden: [tokens, hidden].
        seeds: see `seeds_of`.
        rows: int64 [n], the tokens whose result is wanted; None for all. What comes after the
            attention is done for these alone.
        save: whether `backward` follows.

    Returns: [tokens or n, hidden], and what `backward` takes besides `hidden` and the weights; the
    query, key and value [tokens, 3, heads, head_dim] first.
    """
    spec, w, (p0, p1, p2, *_), _ = layer
    seed0, seed1, seed2, *_ = seeds
    qkv = _qkv(k, layer, hidden)
    context, lse = k.attention(
        *(qkv, batch.cu_seqlens, batch.longest, default_scale(spec.head_dim), p0, seed0),
        *(False, batch.bias, batch.seqused_k, None, None, None, None),
    )
    wanted, residual = picked(rows, context.view(hidden.shape[0], spec.width), hidden)
    projected, bias = _unbiased(k, layer, "out", wanted)
    middle, *stats1 = k.add_layer_norm(projected, residual, *w.norm1, spec.eps, bias, p1, seed1)
    inner, z = _inner(k, layer, middle, save)
    out, bias = _unbiased(k, layer, "down", inner)
    y, *stats2 = k.add_layer_norm(out, middle, *w.norm2, spec.eps, bias, p2, seed2)
    return y, (qkv, context, lse, projected, *stats1, middle, inner, z, out, *stats2)


def backward(
    k, spec: LayerSpec, w: LayerWeights, batch: Batch, drops, rows, saved, hidden, grad, needs, wide
):
    """The gradients of `forward`.

    Args:
        drops: (rates, seeds) of `forward`.
        saved: what it returned.
        grad: [tokens or rows, hidden].
        needs: whether hidden's, the bias's, and each parameter's are needed, as `LayerWeights`.
        wide: 0, or `linear_act._WIDE`, for weights' gradients in fp32.

    Returns: those of hidden, the bias and the parameters in the order of `LayerWeights.flat`; None
    where it isn't needed.
    """
    qkv, context, lse, projected, mean1, rstd1, middle, inner, z, out, mean2, rstd2 = saved
    (p0, p1, p2, *_), (seed0, seed1, seed2, *_) = drops
    through, through_bias, needs = needs
    activation = ACTIVATIONS.index(spec.activation)

    def need(linear, bias=True):
        return _DX | _DW * linear.weight | _DB * (bias and linear.bias) | wide

    def norm(grad, x, residual, norm, stats, x_bias, p, seed):
        dx, ds, dw, db, dx_bias = k.add_layer_norm_backward(
            grad, x, residual, norm.weight, *stats, x_bias, p, seed
        )
        return dx, dx if seed is None else ds, (dw, db.to(norm.bias.dtype)), dx_bias

    stats = mean2, rstd2
    dout, dmiddle, dnorm2, ddown_bias = norm(
        grad, out, middle, w.norm2, stats, w.down.bias, p2, seed2
    )
    dinner, ddown, _ = k.linear_act_backward(
        dout, inner, w.down.weight, None, None, 0, need(needs.down, False)
    )
    d, *dup = k.linear_act_backward(dinner, middle, *w.up, z, activation, need(needs.up))
    dmiddle = d.add_(dmiddle)
    wanted, residual = picked(rows, context.view(hidden.shape[0], spec.width), hidden)
    stats = mean1, rstd1
    dprojected, dresidual, dnorm1, dout_bias = norm(
        dmiddle, projected, residual, w.norm1, stats, w.out.bias, p1, seed1
    )
    dcontext, dout_weight, _ = k.linear_act_backward(
        dprojected, wanted, w.out.weight, None, None, 0, need(needs.out, False)
    )
    if rows is not None:
        dcontext, dresidual = (
            t.new_zeros((hidden.shape[0], t.shape[1])).index_add(0, rows, t)
            for t in (dcontext, dresidual)
        )
    dqkv, dbias, *_ = k.attention_backward(
        *(dcontext.view(context.shape), qkv, context, lse, batch.cu_seqlens, batch.longest),
        *(default_scale(spec.head_dim), p0, seed0, False, batch.bias, batch.seqused_k),
        *(None, None, None, None, through_bias, False),
    )
    own = needs.query, needs.key, needs.value
    weights, biases = any(n.weight for n in own), any(n.bias for n in own)
    dhidden, dwq, dwk, dwv, dbq, dbk, dbv = k.qkv_linear_backward(
        *(dqkv.view(hidden.shape[0], 3 * spec.width), hidden),
        *(w.query.weight, w.key.weight, w.value.weight, w.query.bias),
        _DX * through | _DW * weights | _DB * biases | wide,
    )
    found = LayerWeights(
        query=(dwq, dbq),
        key=(dwk, dbk),
        value=(dwv, dbv),
        out=(dout_weight, dout_bias),
        norm1=dnorm1,
        up=dup,
        down=(ddown, ddown_bias),
        norm2=dnorm2,
    )
    return (
        dhidden.add_(dresidual) if through else None,
        dbias if through_bias else None,
        *(g if n else None for g, n in zip(found.flat(), needs.flat(), strict=True)),
    )
