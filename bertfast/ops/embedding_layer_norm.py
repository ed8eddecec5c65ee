"""dropout(LN(word[ids] + position[positions] + token_type[types])) on packed ids."""

import torch

from .add_layer_norm import centre
from .declare import FLOATS, PROBABILITY, SEED, Below, Number, Tensor
from .dropout import Seed, as_seed, dropout_arguments, keep_mask
from .extension import C
from .library import (
    autograd,
    call,
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


def embedding_layer_norm(
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    token_type_ids: torch.Tensor,
    word: torch.Tensor,
    position: torch.Tensor,
    token_type: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    *,
    dropout_p: float = 0.0,
    seed: Seed | None = None,
) -> torch.Tensor:
    """dropout(LN(word[input_ids] + position[position_ids] + token_type[token_type_ids])).

    Args:
        input_ids, position_ids, token_type_ids: int64 [tokens]; the last may be None with
            token_type None (families without types).
        word: [vocabulary, hidden]; all tables and weights are of one dtype.
        position: [positions, hidden].
        token_type: [types, hidden].
        weight, bias: [hidden].
        dropout_p, seed: see `ops.dropout`; row = token, column = hidden index.

    Returns: [tokens, hidden] in word's dtype.

    Raises: ValueError for shapes that don't fit, IndexError for an id outside its table (on a
    CPU; on a GPU the check would cost a synchronisation).
    """
    _EMBEDDING.shape_of("word", word)
    seed = as_seed(seed, dropout_p, word.device)
    return call(
        "embedding_layer_norm",
        word,
        input_ids,
        position_ids,
        token_type_ids,
        position,
        token_type,
        weight,
        bias,
        float(eps),
        float(dropout_p),
        seed,
    )[0]


def _fake(word, ids, positions, types, position, token_type, weight, bias, eps, p, seed):
    stats = word.new_empty((ids.shape[0],), dtype=wide(word.dtype))
    return word.new_empty((ids.shape[0], word.shape[1])), stats, stats.clone()


def _fake_backward(
    grad, ids, positions, types, word, position, token_type, weight, mean, rstd, p, seed
):
    def like(t):
        return t.new_empty(t.shape)

    types_grad = word.new_empty(0) if token_type is None else like(token_type)
    return like(word), like(position), types_grad, like(weight), like(weight)


_IDS = (
    "Tensor input_ids, Tensor position_ids, Tensor? token_type_ids, ",
    "Tensor position, Tensor? token_type, Tensor weight, ",
)
_ARGUMENTS: dict[str, Tensor | Number] = {
    "word": Tensor("vocabulary, hidden", FLOATS),
    "input_ids": Tensor("tokens", torch.int64, Below("vocabulary")),
    "position_ids": Tensor("tokens", torch.int64, Below("positions")),
    "token_type_ids": Tensor("tokens", torch.int64, Below("types")),
    "position": Tensor("positions, hidden", "as word"),
    "token_type": Tensor("types, hidden", "as word", beside="token_type_ids"),
    "weight": Tensor("hidden", "as word"),
    "dropout_p": PROBABILITY,
    "seed": SEED,
}
_EMBEDDING = define(
    f"embedding_layer_norm(Tensor word, {_IDS[0]}{_IDS[1]}Tensor bias, float eps, "
    "float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor)",
    _fake,
    **_ARGUMENTS,
    bias=Tensor("hidden", "as word"),
)
define(
    f"embedding_layer_norm_backward(Tensor grad, {_IDS[0]}Tensor word, {_IDS[1]}Tensor mean, "
    "Tensor rstd, float dropout_p, Tensor? seed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
    **_ARGUMENTS,
    grad=Tensor("tokens, hidden", "as word"),
    mean=Tensor("tokens", "statistics of word"),
    rstd=Tensor("tokens", "statistics of word"),
)


def _sum(ids, positions, types, word, position, token_type):
    s = word[ids].to(wide(word.dtype)) + position[positions]
    return s if types is None else s + token_type[types]


def _keep(ids, hidden, dropout_p, seed):
    return keep_mask(seed, torch.arange(ids.shape[0], device=ids.device), hidden, dropout_p)


@register("embedding_layer_norm", "reference")
def _reference(word, ids, positions, types, position, token_type, weight, bias, eps, p, seed):
    s = _sum(ids, positions, types, word, position, token_type)
    mean = s.mean(1)
    centred = centre(s, mean)
    rstd = torch.rsqrt(centred.square().mean(1) + eps)
    y = centred * rstd[:, None] * weight + bias
    if seed is not None:
        y = torch.where(_keep(ids, y.shape[1], p, seed), y / (1 - p), 0)
    return y.to(word.dtype), mean, rstd


@register("embedding_layer_norm_backward", "reference")
def _reference_backward(
    grad, ids, positions, types, word, position, token_type, weight, mean, rstd, p, seed
):
    s = _sum(ids, positions, types, word, position, token_type)
    grad = grad.to(s.dtype)
    if seed is not None:
        grad = torch.where(_keep(ids, s.shape[1], p, seed), grad / (1 - p), 0)
    normed = centre(s, mean) * rstd[:, None]
    scaled = grad * weight
    ds = scaled - scaled.mean(1, keepdim=True) - normed * (scaled * normed).mean(1, keepdim=True)
    ds = ds * rstd[:, None]

    def scatter(table, rows):
        if table is None:
            return word.new_empty(0)
        out = torch.zeros(table.shape, dtype=ds.dtype, device=ds.device)
        return out.index_add_(0, rows, ds).to(table.dtype)

    return (
        scatter(word, ids),
        scatter(position, positions),
        scatter(token_type, types),
        (grad * normed).sum(0).to(weight.dtype),
        grad.sum(0).to(weight.dtype),
    )


def _arguments(ids, positions, types, word, position, token_type, weight, mean, rstd, p, seed):
    return (
        *(ptr(ids), ptr(positions), ptr(types), ptr(word), ptr(position), ptr(token_type)),
        *(ptr(weight), dropout_arguments(p, seed), ptr(mean), ptr(rstd)),
        *(ids.shape[0], word.shape[1], is_bf16(word)),
    )


@register("embedding_layer_norm", "cpu", limit=cpu_limit)
def _cpu(word, ids, positions, types, position, token_type, weight, bias, eps, p, seed):
    word, ids, positions, types = dense(word), dense(ids), dense(positions), dense(types)
    position, token_type, weight = dense(position), dense(token_type), dense(weight)
    bias, seed = dense(bias), dense(seed)
    tokens, hidden = ids.shape[0], word.shape[1]
    y = torch.empty((tokens, hidden), dtype=word.dtype)
    mean, rstd = torch.empty(tokens), torch.empty(tokens)
    tables = word, position, token_type, weight
    C.embedding_layer_norm(
        *_arguments(ids, positions, types, *tables, mean, rstd, p, seed), ptr(bias), eps, ptr(y)
    )
    return y, mean, rstd


@register("embedding_layer_norm_backward", "cpu", limit=cpu_limit)
def _cpu_backward(
    grad, ids, positions, types, word, position, token_type, weight, mean, rstd, p, seed
):
    grad, word, ids, positions = dense(grad), dense(word), dense(ids), dense(positions)
    types, position, token_type = dense(types), dense(position), dense(token_type)
    weight, seed, mean, rstd = dense(weight), dense(seed), dense(mean), dense(rstd)
    tokens, hidden = grad.shape
    ds, columns = torch.empty((tokens, hidden)), torch.empty((2, hidden))
    tables = word, position, token_type, weight
    C.embedding_layer_norm_backward(
        *_arguments(ids, positions, types, *tables, mean, rstd, p, seed),
        *(ptr(grad), ptr(ds), ptr(columns)),
    )

    def scatter(table, rows):
        if table is None:
            return torch.empty(0, dtype=word.dtype)
        out = torch.empty(table.shape)
        C.scatter_add(ptr(ds), ptr(rows), ptr(out), tokens, hidden, table.shape[0])
        return out.to(table.dtype)

    return (
        scatter(word, ids),
        scatter(position, positions),
        scatter(token_type, types),
        *(c.to(weight.dtype, copy=True) for c in columns),
    )


register_triton(
    "embedding_layer_norm", "embedding_layer_norm.embedding_layer_norm", triton_row_limit
)
register_triton(
    "embedding_layer_norm_backward",
    "embedding_layer_norm.embedding_layer_norm_backward",
    triton_row_limit,
)


def _setup(ctx, inputs, output):
    word, ids, positions, types, position, token_type, weight, _, _, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(
        ids, positions, types, word, position, token_type, weight, output[1], output[2], seed
    )
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 11
    *saved, seed = ctx.saved_tensors
    dword, dposition, dtype, dweight, dbias = torch.ops.bertfast.embedding_layer_norm_backward(
        grad, *saved, ctx.dropout_p, seed
    )
    dtype = None if saved[5] is None else dtype
    return dword, None, None, None, dposition, dtype, dweight, dbias, None, None, None


autograd("embedding_layer_norm", _backward, _setup)
