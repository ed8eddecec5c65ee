"""softmax(Q K^T * scale + bias) V where queries and keys are different packed sequences, as in a
decoder that attends to an encoder; see `attention`."""

import torch

from .attention import cpu, cpu_backward, default_scale, triton_attention_limit
from .attention_reference import Options, reference, reference_backward
from .declare import FLOATS, LENGTH, PROBABILITY, SEED, Number, Offsets, Tensor
from .dropout import Seed, as_seed
from .library import autograd, cpu_limit, define, register_triton, wide
from .registry import register


def cross_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Seed | None = None,
    causal: bool = False,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of each packed sequence's queries to its own keys, dropout on the probabilities.

    Args:
        q: [tokens_q, heads, head_dim].
        kv: [tokens_k, 2, heads, head_dim] in q's dtype, keys and values; any strides with a dense
            last dimension, as q.
        cu_seqlens_q, cu_seqlens_k: int32 [batch + 1], the sequences' offsets: 0 first, tokens last.
        max_seqlen_q, max_seqlen_k: upper bounds of the lengths.
        scale: of the scores, 1 / sqrt(head_dim) if None.
        dropout_p, seed: see `ops.dropout`; row = query token * heads + head, column = key position.
        causal: the query at position i sees the keys at positions 0 to i, as PyTorch's is_causal.
        bias: [batch or 1, heads or 1, max_seqlen_q, max_seqlen_k], added to the scores; -inf masks.

    Returns: [tokens_q, heads, head_dim] in q's dtype. A row whose keys are all masked is zeros, as
    are the rows of a sequence without keys.

    Raises: ValueError or TypeError for arguments that don't fit together.
    """
    head_dim = _CROSS.shape_of("q", q)[2]
    scale = default_scale(head_dim) if scale is None else float(scale)
    seed = as_seed(seed, dropout_p, q.device)
    return torch.ops.bertfast.cross_attention(
        *(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
        *(scale, float(dropout_p), seed, causal, bias),
    )[0]


def _fake(q, kv, *_):
    tokens, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((heads, tokens), dtype=wide(q.dtype))


def _fake_backward(grad, q, kv, *rest):
    *_, bias, need_dbias = rest
    dbias = bias.new_empty(bias.shape) if need_dbias else q.new_empty(0)
    return q.new_empty(q.shape), kv.new_empty(kv.shape), dbias


_OPTIONS = (
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "float scale, float dropout_p, Tensor? seed, bool causal, Tensor? bias"
)
_ARGUMENTS: dict[str, Tensor | Number] = {
    "q": Tensor("tokens_q, heads, head_dim", FLOATS),
    "kv": Tensor("tokens_k, 2, heads, head_dim", "as q"),
    "cu_seqlens_q": Tensor("batch + 1", torch.int32, Offsets("tokens_q", "max_seqlen_q")),
    "cu_seqlens_k": Tensor("batch + 1", torch.int32, Offsets("tokens_k", "max_seqlen_k")),
    "max_seqlen_q": LENGTH,
    "max_seqlen_k": LENGTH,
    "dropout_p": PROBABILITY,
    "seed": SEED,
    "bias": Tensor("batch or 1, heads or 1, >= max_seqlen_q, >= max_seqlen_k", "as q or float32"),
}
_OUT = Tensor("tokens_q, heads, head_dim", "as q")
_CROSS = define(
    f"cross_attention(Tensor q, Tensor kv, {_OPTIONS}) -> (Tensor, Tensor)", _fake, **_ARGUMENTS
)
define(
    f"cross_attention_backward(Tensor grad, Tensor q, Tensor kv, Tensor out, Tensor lse, "
    f"{_OPTIONS}, bool need_dbias) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
    **_ARGUMENTS,
    grad=_OUT,
    out=_OUT,
    lse=Tensor("heads, tokens_q", "statistics of q"),
    need_dbias=Number(needs="bias"),
)


@register("cross_attention", "reference")
def _reference(q, kv, starts_q, starts_k, longest_q, longest_k, *options):
    return reference(q, kv, starts_q, starts_k, Options(*options))


@register("cross_attention_backward", "reference")
def _reference_backward(grad, q, kv, out, lse, starts_q, starts_k, longest_q, longest_k, *options):
    *options, need_dbias = options
    arguments = grad, q, kv, lse, starts_q, starts_k, Options(*options), need_dbias
    return reference_backward(*arguments)[:3]


@register("cross_attention", "cpu", limit=cpu_limit)
def _cpu(q, kv, starts_q, starts_k, longest_q, longest_k, *options):
    return cpu(q, kv, starts_q, starts_k, Options(*options))


@register("cross_attention_backward", "cpu", limit=cpu_limit)
def _cpu_backward(grad, q, kv, out, lse, starts_q, starts_k, longest_q, longest_k, *options):
    dq, dkv = torch.empty(q.shape, dtype=q.dtype), torch.empty(kv.shape, dtype=kv.dtype)
    *options, need_dbias = options
    arguments = grad, q, kv, lse, starts_q, starts_k, Options(*options), need_dbias, dq, dkv
    return dq, dkv, cpu_backward(*arguments)[0]


register_triton("cross_attention", "attention.cross_forward", triton_attention_limit)
register_triton(
    "cross_attention_backward", "attention_backward.cross_backward", triton_attention_limit
)


def _setup(ctx, inputs, output):
    q, kv, starts_q, starts_k, *ctx.options, seed, ctx.causal, bias = inputs
    ctx.save_for_backward(q, kv, *output, starts_q, starts_k, seed, bias)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 11
    *tensors, seed, bias = ctx.saved_tensors
    need_dbias = ctx.needs_input_grad[10]
    dq, dkv, dbias = torch.ops.bertfast.cross_attention_backward(
        grad, *tensors, *ctx.options, seed, ctx.causal, bias, need_dbias
    )
    return dq, dkv, *(None,) * 8, dbias if need_dbias else None


autograd("cross_attention", _backward, _setup)
