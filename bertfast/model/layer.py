"""The arithmetic of one BERT encoder layer, in the one place that every model family calls."""

import functools
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .. import ops
from ..ops.declare import FLOATS, LENGTH, Below, Declaration, Number, Offsets, Tensor, UpToLengths
from . import direct

# transformers' names for what the kernels compute
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

STATES = Declaration(  # what the encoder's layers take in one call
    "encoder(Tensor hidden, SymInt size, Tensor cu_seqlens, SymInt seqlen, Tensor? seqused_k, "
    "Tensor? rows) -> Tensor",
    hidden=Tensor("tokens, size", FLOATS),
    size=Number(1),
    cu_seqlens=Tensor("batch + 1", torch.int32, Offsets("tokens", "seqlen")),
    seqlen=LENGTH,
    seqused_k=Tensor("batch", torch.int32, UpToLengths("cu_seqlens")),
    rows=Tensor("n", torch.int64, Below("tokens")),
)


# and what torch computes for them
FUNCTIONS = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class LayerWeights(NamedTuple):
    """Parameters of a layer, laid out as in nn.Linear and nn.LayerNorm."""

    wq: torch.Tensor  # [hidden, hidden], as wk, wv and wo
    bq: torch.Tensor  # [hidden], as bk, bv and bo
    wk: torch.Tensor
    bk: torch.Tensor
    wv: torch.Tensor
    bv: torch.Tensor
    wo: torch.Tensor
    bo: torch.Tensor
    norm1: torch.Tensor  # [hidden]: LayerNorm after attention
    norm1_bias: torch.Tensor
    w1: torch.Tensor  # [inner, hidden]
    b1: torch.Tensor
    w2: torch.Tensor  # [hidden, inner]
    b2: torch.Tensor
    norm2: torch.Tensor
    norm2_bias: torch.Tensor

    @classmethod
    def shapes(cls, hidden: int, inner: int) -> list[tuple]:
        """What their shapes must be, in their order."""
        shapes = dict.fromkeys(cls._fields, (hidden,))
        shapes |= dict.fromkeys(("wq", "wk", "wv", "wo"), (hidden, hidden))
        shapes |= {"w1": (inner, hidden), "b1": (inner,), "w2": (hidden, inner)}
        return list(shapes.values())


class LayerOptions(NamedTuple):
    heads: int
    activation: str
    eps: float
    attention_dropout: float = 0.0
    projection_dropout: float = 0.0  # of the attention's output projection
    output_dropout: float = 0.0  # of the feed-forward's output


def rate(dropout: nn.Dropout, user: nn.Module | None = None) -> float:
    """The probability that the module drops with now; `user` is the module that decides, where
    its code reads the probability instead of calling the module."""
    return getattr(dropout, "p", 0.0) if (user or dropout).training else 0.0  # nn.Identity's


def encoder_layer(
    hidden,
    w: LayerWeights,
    options: LayerOptions,
    cu_seqlens,
    max_seqlen,
    seeds,
    rows=None,
    bias=None,
    keep_qkv=True,
    seqused_k=None,
):
    """A post-norm encoder layer (Devlin et al., arXiv:1810.04805) on packed tokens.

    Args:
        hidden: [tokens, hidden].
        cu_seqlens, max_seqlen: the sequences, see `ops.attention`.
        seeds: int64 [3, 2], one for each dropout: attention, its output, the feed-forward's.
        rows: int64 [n], the tokens whose result is wanted; None for all. What comes after the
            attention is done for these alone.
        bias, seqused_k: of the attention, see `ops.attention`.
        keep_qkv: whether the query, key and value are wanted.

    Returns: [tokens or n, hidden], and the query, key and value [tokens, 3, heads, head_dim] or,
    where they aren't wanted, maybe None.
    """
    if not keep_qkv and direct.serves(hidden, w, options, cu_seqlens, max_seqlen, bias):
        sequences = cu_seqlens, max_seqlen, seqused_k
        return direct.run(hidden, w, options, *sequences, seeds, rows), None
    tokens = hidden.shape[0]
    qkv = ops.qkv_linear(hidden, w.wq, w.bq, w.wk, w.bk, w.wv, w.bv)
    qkv = qkv.view(tokens, 3, options.heads, w.wq.shape[0] // options.heads)
    context = ops.attention(
        *(qkv, cu_seqlens, max_seqlen),
        dropout_p=options.attention_dropout,
        seed=seeds[0],
        bias=bias,
        seqused_k=seqused_k,
    )
    context = context.view(tokens, w.wq.shape[0])
    if rows is not None:
        context, hidden = context.index_select(0, rows), hidden.index_select(0, rows)
    projected = ops.linear_act(context, w.wo)
    # The biases of both outputs are added where the dropout and the residual are.
    hidden = ops.add_layer_norm(
        *(projected, hidden, w.norm1, w.norm1_bias, options.eps),
        x_bias=w.bo,
        dropout_p=options.projection_dropout,
        seed=seeds[1],
    )
    inner = ops.feed_forward(hidden, w.w1, w.b1, w.w2, None, options.activation)
    hidden = ops.add_layer_norm(
        *(inner, hidden, w.norm2, w.norm2_bias, options.eps),
        x_bias=w.b2,
        dropout_p=options.output_dropout,
        seed=seeds[2],
    )
    return hidden, qkv
