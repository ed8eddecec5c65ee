"""softmax(Q K^T * scale + bias) V over packed sequences.

Relative positions are disentangled (He et al., arXiv:2006.03654): a score is scale * (q_i.k_j +
q_i.rel_key[r] + k_j.rel_query[r]), where r is the bucket of i - j.

The log-sum-exp of each row is kept so that backward recomputes the probabilities instead of
storing them (Dao et al., arXiv:2205.14135).
"""

import math
from typing import Any

import torch

from .attention_reference import Options, empty_or_zeros, reference, reference_backward
from .declare import (
    FLOATS,
    LENGTH,
    PROBABILITY,
    SEED,
    Below,
    Number,
    Offsets,
    Tensor,
    UpToLengths,
)
from .dropout import Seed, as_seed, dropout_arguments
from .extension import C
from .library import (
    DECLARED,
    GPU_DTYPES,
    autograd,
    cpu_limit,
    define,
    dense,
    is_bf16,
    ptr,
    register_triton,
    triton_limit,
    wide,
)
from .registry import Limit, register


def attention(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Seed | None = None,
    causal: bool = False,
    bias: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    window: int | None = None,
    rel_key: torch.Tensor | None = None,
    rel_query: torch.Tensor | None = None,
    rel_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """Self-attention within each packed sequence, dropout on the probabilities.

    Args:
        qkv: [tokens, 3, heads, head_dim], any strides with a dense last dimension.
        cu_seqlens: int32 [batch + 1], the sequences' offsets: 0 first, tokens last.
        max_seqlen: an upper bound of the lengths.
        scale: of the scores, 1 / sqrt(head_dim) if None.
        dropout_p, seed: see `ops.dropout`; row = token * heads + head, column = key position.
        causal: a query sees the keys up to its own position.
        bias: [batch or 1, heads or 1, max_seqlen, max_seqlen], added to the scores; -inf masks.
        seqused_k: int32 [batch], how many of each sequence's tokens are keys, its first ones; None
            for all. The others are queries alone: the padding of a batch whose rows are read.
        window: a query sees the keys at most so many positions before or after it; None for all.
        rel_key, rel_query: [buckets, heads, head_dim] in qkv's dtype, embeddings of relative
            positions, which meet queries and keys as keys and queries do; None for none.
        rel_index: int32 [2n - 1] for an n >= max_seqlen, with either of them: the bucket of
            (query position - key position) from -(n - 1) to n - 1.

    Returns: [tokens, heads, head_dim] in qkv's dtype. A row whose keys are all masked is zeros.

    Raises: ValueError or TypeError for arguments that don't fit together.
    """
    head_dim = _ATTENTION.shape_of("qkv", qkv)[3]
    scale = default_scale(head_dim) if scale is None else float(scale)
    seed = as_seed(seed, dropout_p, qkv.device)
    return torch.ops.bertfast.attention(
        *(qkv, cu_seqlens, max_seqlen, scale, float(dropout_p), seed, causal, bias, seqused_k),
        *(window, rel_key, rel_query, rel_index),
    )[0]


def default_scale(head_dim: int) -> float:
    return 1 / math.sqrt(head_dim) if head_dim else 1.0


def _fake(qkv, *_):
    tokens, _, heads, head_dim = qkv.shape
    lse = qkv.new_empty((heads, tokens), dtype=wide(qkv.dtype))
    return qkv.new_empty((tokens, heads, head_dim)), lse


def _fake_backward(grad, qkv, out, lse, cu_seqlens, max_seqlen, *options):
    *options, need_dbias, need_drel = options
    o = Options(*options)
    given = o.given(need_dbias, need_drel)
    others = (qkv.new_empty(0) if t is None else t.new_empty(t.shape) for t in given)
    return qkv.new_empty(qkv.shape), *others


_OPTIONS = (
    "Tensor cu_seqlens, SymInt max_seqlen, float scale, float dropout_p, Tensor? seed, "
    "bool causal, Tensor? bias, Tensor? seqused_k, "
    "int? window, Tensor? rel_key, Tensor? rel_query, Tensor? rel_index"
)
_REL = Tensor("buckets, heads, head_dim", "as qkv")
_ARGUMENTS: dict[str, Tensor | Number] = {
    "qkv": Tensor("tokens, 3, heads, head_dim", FLOATS),
    "cu_seqlens": Tensor("batch + 1", torch.int32, Offsets("tokens", "max_seqlen")),
    "max_seqlen": LENGTH,
    "dropout_p": PROBABILITY,
    "seed": SEED,
    "bias": Tensor("batch or 1, heads or 1, >= max_seqlen, >= max_seqlen", "as qkv or float32"),
    "seqused_k": Tensor("batch", torch.int32, UpToLengths("cu_seqlens")),
    "window": LENGTH,
    "rel_key": _REL,
    "rel_query": _REL,
    "rel_index": Tensor(
        *("2n - 1 for n >= max_seqlen", torch.int32, Below("buckets")), "rel_key or rel_query"
    ),
}
_OUT = Tensor("tokens, heads, head_dim", "as qkv")
_ATTENTION = define(f"attention(Tensor qkv, {_OPTIONS}) -> (Tensor, Tensor)", _fake, **_ARGUMENTS)
define(
    f"attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, {_OPTIONS}, "
    "bool need_dbias, bool need_drel) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
    **_ARGUMENTS,
    grad=_OUT,
    out=_OUT,
    lse=Tensor("heads, tokens", "statistics of qkv"),
    need_dbias=Number(needs="bias"),
    need_drel=Number(needs="rel_index"),
)


@register("attention", "reference")
def _reference(qkv, cu_seqlens, max_seqlen, *options):
    return reference(qkv[:, 0], qkv[:, 1:], cu_seqlens, cu_seqlens, Options(*options))


@register("attention_backward", "reference")
def _reference_backward(grad, qkv, out, lse, cu_seqlens, max_seqlen, *options):
    *options, need_dbias, need_drel = options
    dq, dkv, *others = reference_backward(
        *(grad, qkv[:, 0], qkv[:, 1:], lse, cu_seqlens, cu_seqlens),
        *(Options(*options), need_dbias, need_drel),
    )
    return torch.cat([dq.unsqueeze(1), dkv], 1), *others


def dense_last(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def bias_arguments(bias: torch.Tensor | None) -> tuple[int, ...]:
    """What C++'s Bias takes: pointer, the batch, head and query strides (0 where broadcast), and
    dtype."""
    if bias is None:
        return 0, 0, 0, 0, 0
    steps = [0 if n == 1 else s for n, s in zip(bias.shape[:2], bias.stride(), strict=False)]
    return ptr(bias), *steps, bias.stride(2), GPU_DTYPES.index(bias.dtype)


def _cpu_arguments(q, kv, starts_q, starts_k, o):
    tokens, heads, dim = q.shape
    return (
        *(ptr(q), ptr(kv[:, 0]), ptr(kv[:, 1])),
        *(*q.stride()[:2], kv.stride(0), kv.stride(2), ptr(starts_q), ptr(starts_k)),
        ptr(o.seqused_k),
        *(starts_q.shape[0] - 1, tokens, heads, dim, o.scale, bias_arguments(o.bias)),
        *(dropout_arguments(o.dropout_p, o.seed), o.causal, is_bf16(q)),
        -1 if o.window is None else o.window,
        *(ptr(o.rel_key), ptr(o.rel_query), _zero_distance(o.rel_index)),
    )


def _zero_distance(rel_index):
    """Where the bucket of the distance 0 is."""
    if rel_index is None:
        return 0
    return ptr(rel_index) + rel_index.shape[0] // 2 * rel_index.element_size()


_DENSE = "seed", "seqused_k", "rel_key", "rel_query", "rel_index"


def _made_dense(q, kv, starts_q, starts_k, o):
    """As the C++ kernels read them."""
    bias = None if o.bias is None else dense_last(o.bias)
    own = {n: dense(getattr(o, n)) for n in _DENSE}
    o = o._replace(bias=bias, **own)
    return dense_last(q), dense_last(kv), dense(starts_q), dense(starts_k), o


def cpu(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference`."""
    q, *_ = arguments = _made_dense(*arguments)
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty((q.shape[1], q.shape[0]))
    C.attention(*_cpu_arguments(*arguments), ptr(out), ptr(lse))
    return out, lse


def cpu_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    kv: torch.Tensor,
    lse: torch.Tensor,
    starts_q: torch.Tensor,
    starts_k: torch.Tensor,
    o: Options,
    need_dbias: bool,
    dq: torch.Tensor,
    dkv: torch.Tensor,
    need_drel: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Fills dq and dkv, whose heads are dense; -> dbias, drel_key and drel_query as what they are
    of, or empty."""
    grad, lse = dense(grad), dense(lse)
    q, kv, starts_q, starts_k, o = arguments = _made_dense(q, kv, starts_q, starts_k, o)
    # One full square per sequence and head, so that no two threads add to one place.
    rows, columns = o.bias.shape[2:] if need_dbias else (0, 0)
    dbias = None
    if need_dbias:
        dbias = torch.zeros((starts_q.shape[0] - 1, q.shape[1], rows, columns))
    _, *rel = o.given(need_dbias, need_drel)
    drel = [None if t is None else torch.zeros(t.shape) for t in rel]
    C.attention_backward(
        *_cpu_arguments(*arguments),
        *(ptr(grad), ptr(lse), ptr(dq), ptr(dkv[:, 0]), ptr(dkv[:, 1])),
        *(dq.stride(0), dkv.stride(0), ptr(dbias), rows, columns, *map(ptr, drel)),
    )
    return (
        dbias.sum_to_size(o.bias.shape).to(o.bias.dtype) if need_dbias else q.new_empty(0),
        *(q.new_empty(0) if t is None else t.to(q.dtype) for t in drel),
    )


def full_and_plain(operator: str, limit: Limit) -> Limit:
    """`limit` of a backend of attention that has neither windows nor relative positions."""
    at = DECLARED[operator].names.index("window")

    def more(device, dtype, arguments):
        if any(a is not None for a in arguments[at : at + 4]):
            return "it has no window and no relative positions"
        return limit(device, dtype, arguments)

    return more


@register("attention", "cpu", limit=cpu_limit)
def _cpu(qkv, cu_seqlens, max_seqlen, *options):
    return cpu(qkv[:, 0], qkv[:, 1:], cu_seqlens, cu_seqlens, Options(*options))


@register("attention_backward", "cpu", limit=cpu_limit)
def _cpu_backward(grad, qkv, out, lse, cu_seqlens, max_seqlen, *options):
    *options, need_dbias, need_drel = options
    o = Options(*options)
    dqkv = empty_or_zeros(o.seqused_k)(qkv.shape, dtype=qkv.dtype)
    own = grad, qkv[:, 0], qkv[:, 1:], lse, cu_seqlens, cu_seqlens, o, need_dbias
    return dqkv, *cpu_backward(*own, dqkv[:, 0], dqkv[:, 1:], need_drel)


def _setup(ctx, inputs, output):
    qkv, cu_seqlens, *ctx.options, seed, ctx.causal, bias, seqused_k, ctx.window = inputs[:-3]
    ctx.save_for_backward(qkv, *output, cu_seqlens, seed, bias, seqused_k, *inputs[-3:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 13
    *tensors, seed, bias, seqused_k, rel_key, rel_query, rel_index = ctx.saved_tensors
    need_dbias, (need_key, need_query) = ctx.needs_input_grad[7], ctx.needs_input_grad[10:12]
    dqkv, dbias, drel_key, drel_query = torch.ops.bertfast.attention_backward(
        *(grad, *tensors, *ctx.options, seed, ctx.causal, bias, seqused_k, ctx.window),
        *(rel_key, rel_query, rel_index, need_dbias, need_key or need_query),
    )
    relative = drel_key if need_key else None, drel_query if need_query else None
    return dqkv, *(None,) * 6, dbias if need_dbias else None, None, None, *relative, None


autograd("attention", _backward, _setup)


def triton_attention_limit(
    device: str, dtype: torch.dtype, arguments: tuple[Any, ...]
) -> str | None:
    head_dim = arguments[0].shape[-1] if arguments else 0
    if head_dim > 128:
        return f"head_dim is {head_dim}, it takes up to 128"
    return triton_limit(device, dtype, arguments)


register_triton("attention", "attention.forward", triton_attention_limit)
register_triton("attention_backward", "attention_backward.backward", triton_attention_limit)
