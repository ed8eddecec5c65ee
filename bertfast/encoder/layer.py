"""The arithmetic of a layer, forward and backward, over whatever kernels it is given.

`k` has the operators' functions by name, all with the schemas' arguments: a backend's own, or the
dispatcher's.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from ..ops.dropout import as_seed
from ..ops.library import wide
from ..ops.linear_act import _DB, _DW, _DX, ACTIVATIONS
from .batch import Batch
from .spec import DROPOUTS, Layer, LayerSpec, Seeds, of_layer
from .weights import NONE, LayerWeights

_ACTIVATE = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu}
_ACTIVATE["silu"] = F.silu
_QKV = "query", "key", "value"


def seeds_of(layer: Layer, seeds: Seeds | None, device: torch.device) -> list[torch.Tensor | None]:
    """Of its dropouts; None of one that doesn't drop. seeds: int64 [DROPOUTS, 2], or None."""
    seeds = (None,) * DROPOUTS if seeds is None else seeds
    return [as_seed(s, p, device) if p else None for s, p in zip(seeds, layer.dropout, strict=True)]


def each(layers: list[Layer], batch: Batch, one: Callable[..., torch.Tensor]) -> torch.Tensor:
    """`one(layer, batch, hidden, seeds, rows)`, layer after layer: [tokens or rows, hidden]."""
    hidden, seeds = batch.hidden, batch.seeds
    seeds = seeds.unbind() if isinstance(seeds, torch.Tensor) else seeds
    for i, layer in enumerate(layers):
        own = None if seeds is None else of_layer(seeds, i)
        rows = batch.rows if i + 1 == len(layers) else None
        hidden = one(layer, batch, hidden, own, rows)
    return hidden


def picked(rows: torch.Tensor | None, *tensors: torch.Tensor) -> Sequence[torch.Tensor]:
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


def _qkv(k, layer: Layer, x):
    """[tokens, 3, heads, head_dim]"""
    (spec, w, *_), tokens = layer, x.shape[0]
    if _QKV in layer.stacked:
        qkv = _product(k, layer, "query", x)
    elif spec.groups > 1 or any([role in layer.adapters for role in _QKV]):
        query, *shared = (_product(k, layer, role, x) for role in _QKV)
        shape = tokens, spec.heads // spec.groups, spec.groups, spec.head_dim
        shared = [t.view(*shape[:2], 1, spec.head_dim).expand(shape) for t in shared]
        qkv = torch.stack([query, *(t.reshape(query.shape) for t in shared)], 1)
    else:
        qkv = k.qkv_linear(x, *w.query, *w.key, *w.value)
    return qkv.view(tokens, 3, spec.heads, spec.head_dim)


def _inner(k, layer: Layer, x, seed, save: bool):
    """[n, inner], and what `linear_act` saves."""
    activation = layer.spec.activation
    if layer.spec.gated:
        if ("up", "gate") in layer.stacked:
            parts = _product(k, layer, "up", x).chunk(2, 1)
        else:
            parts = (_product(k, layer, role, x) for role in ("up", "gate"))
        code = ACTIVATIONS.index(activation)
        return k.gated_act(*parts, code, layer.dropout.inner, seed), None
    if "up" in layer.adapters:
        return _ACTIVATE[activation](_product(k, layer, "up", x)), None
    return k.linear_act(x, *layer.weights.up, ACTIVATIONS.index(activation), save)


def _relative(k, layer: Layer, batch: Batch, seed):
    """What queries and keys meet of relative positions, `ops.attention`'s rel_key and rel_query,
    and its rel_index. Without matrices of their own they share the key's and the query's."""
    spec = layer.spec
    if not spec.relative:
        return None, None, None
    embeddings, index = batch.relative
    if seed is not None:
        p = layer.dropout.relative
        embeddings = k.add_layer_norm(embeddings, None, *NONE, 0.0, None, p, seed, False)[0]
    found = dict.fromkeys(("c2p", "p2c"))
    for kind in spec.relative:
        product = _product(k, layer, layer.role_of(kind), embeddings)
        found[kind] = product.view(-1, spec.heads, spec.head_dim)
    return *found.values(), index


def _attention(k, layer: Layer, batch: Batch, qkv, seed, relative_seed):
    """`ops.attention`, and what `Even` says of padding."""
    (spec, _, (p, *_), *_), even, starts = layer, batch.even, batch.cu_seqlens
    context, lse = k.attention(
        *(qkv, starts, batch.longest, spec.scale, p, seed),
        *(False, batch.bias, batch.seqused_k, spec.window),
        *_relative(k, layer, batch, relative_seed),
    )
    if even is None:
        return context, lse
    queries, values = qkv.new_zeros((len(even.rows), *qkv.shape[2:])), qkv[:, 2:]
    mean = k.cross_attention(  # with scores of zero
        *(queries, values.expand(-1, 2, -1, -1), even.cu_rows, starts),
        *(even.longest, batch.longest, 0.0, p, seed, False, None),
    )[0]
    if even.share is not None:
        last, share = values[:, 0].index_select(0, even.rows), even.share.view(-1, 1, 1)
        exact = wide(mean.dtype)
        mean = torch.lerp(mean.to(exact), last.to(exact), share.to(exact)).to(mean.dtype)
    return context.index_copy(0, even.rows, mean), lse


def forward(
    k: Any,
    layer: Layer,
    batch: Batch,
    hidden: torch.Tensor,
    seeds: Sequence[torch.Tensor | None],
    rows: torch.Tensor | None,
    save: bool,
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
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
    spec, w, (_, p1, p2, *_), *_ = layer
    seed0, seed1, seed2, inner_seed, relative_seed = seeds

    def add(x, residual, norm, bias=None, p=0.0, seed=None):
        rms = spec.rms and norm is not NONE
        return k.add_layer_norm(x, residual, *norm, spec.eps, bias, p, seed, rms)

    before, after = ((w.norm1, w.norm2), (NONE, NONE))[:: 1 if spec.pre_norm else -1]
    x = hidden if before[0].weight is None else add(hidden, None, before[0])[0]
    qkv = _qkv(k, layer, x)
    turned = qkv if spec.rotary is None else k.rotary(qkv, batch.angles[spec.rotary], False)
    context, lse = _attention(k, layer, batch, turned, seed0, relative_seed)
    wanted, residual = picked(rows, context.view(hidden.shape[0], spec.width), hidden)
    projected, bias = _unbiased(k, layer, "out", wanted)
    middle, *stats1 = add(projected, residual, after[0], bias, p1, seed1)
    x = middle if before[1].weight is None else add(middle, None, before[1])[0]
    inner, z = _inner(k, layer, x, inner_seed, save)
    out, bias = _unbiased(k, layer, "down", inner)
    y, *stats2 = add(out, middle, after[1], bias, p2, seed2)
    return y, (qkv, context, lse, projected, *stats1, middle, inner, z, out, *stats2)


def backward(
    k: Any,
    spec: LayerSpec,
    w: LayerWeights,
    batch: Batch,
    drops: tuple[Any, ...],
    rows: torch.Tensor | None,
    saved: Sequence[Any],
    hidden: torch.Tensor,
    grad: torch.Tensor,
    needs: LayerWeights,
    wide: int,
) -> tuple[torch.Tensor | None, ...]:
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
            grad, x, residual, norm.weight, *stats, x_bias, p, seed, False
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
        *(spec.scale, p0, seed0, False, batch.bias, batch.seqused_k),
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
