"""Embeddings, layers and pooler, with transformers' names, on packed tokens inside.

Calling the modules one by one, in plain PyTorch, is the definition; kernels take their place where
nobody could tell (watch.py). A hook or an adapter sees [tokens, hidden], without the padding.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..encoder import Batch, Layer, Unfit, run, watch
from ..encoder import layer as arithmetic
from ..encoder.batch import PackedSequences, Packing
from ..encoder.executors import operators
from ..encoder.packed import Freezable
from ..encoder.replay import Graphs
from ..encoder.spec import of_layer
from ..families.bert import bert_like
from ..families.family import ACTIVATIONS, rate
from ..ops.dropout import dropped
from ..ops.library import unwatched

if TYPE_CHECKING:
    from transformers import BertConfig


def activation(config: "BertConfig") -> nn.Module:
    kernel = ACTIVATIONS[config.hidden_act]
    return nn.ReLU() if kernel == "relu" else nn.GELU("tanh" if kernel == "gelu_tanh" else "none")


class Dropout(nn.Dropout):
    """Its mask is the kernels', drawn by a seed."""

    def forward(
        self, x: torch.Tensor, seed: torch.Tensor | None = None, number: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [n, hidden], seed int64 [2], number int64 [n]: see `BertLayer.forward`."""
        return dropped(x, rate(self), seed, number)


def _dropped(dropout, x, *seed):
    """By a module that may be another in the place of ours."""
    return dropout(x, *seed) if isinstance(dropout, Dropout) else dropout(x)


class BertEmbeddings(nn.Module):
    def __init__(self, config: "BertConfig") -> None:
        super().__init__()
        size = config.hidden_size
        self.word_embeddings = nn.Embedding(
            config.vocab_size, size, padding_idx=config.pad_token_id
        )
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def tables(self) -> tuple[torch.Tensor, ...] | None:
        """The parameters of the tables and of the norm, where kernels may read them and do what
        calling the modules would; or None."""
        modules = tuple([self._modules[name] for name in _EMBEDDINGS])
        if watch.limit(modules, tuple(_EMBEDDINGS.values())):
            return None
        *tables, norm, _ = modules
        if any(t.max_norm is not None or t.scale_grad_by_freq or t.sparse for t in tables):
            return None
        weights = [t._parameters["weight"] for t in tables]
        return *weights, norm._parameters["weight"], norm._parameters["bias"]

    def forward(
        self,
        input_ids: torch.Tensor | None,
        position_ids: torch.Tensor,
        token_type_ids: torch.Tensor,
        seed: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """ids int64 [tokens] (inputs_embeds [tokens, hidden] for input_ids) -> [tokens, hidden]"""
        by_modules = inputs_embeds is not None or watch.global_hooks()
        tables = None if by_modules else self.tables()
        if tables is not None:
            return ops.embedding_layer_norm(
                *(input_ids, position_ids, token_type_ids, *tables, self.LayerNorm.eps),
                dropout_p=rate(self.dropout),
                seed=seed,
            )
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        types = self.token_type_embeddings(token_type_ids)
        x = words.to(types.dtype) + types + self.position_embeddings(position_ids)
        return _dropped(self.dropout, self.LayerNorm(x), seed)


_EMBEDDINGS = {
    "word_embeddings": nn.Embedding,
    "position_embeddings": nn.Embedding,
    "token_type_embeddings": nn.Embedding,
    "LayerNorm": nn.LayerNorm,
    "dropout": Dropout,
}


class BertSelfAttention(nn.Module):
    def __init__(self, config: "BertConfig") -> None:
        super().__init__()
        self.config = config
        for name in ("query", "key", "value"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size))
        self.dropout = Dropout(config.attention_probs_dropout_prob)

    @property
    def attention_head_size(self) -> int:
        return self.config.hidden_size // self.config.num_attention_heads

    def forward(
        self,
        hidden: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        seed: torch.Tensor | None,
        seqused_k: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """-> [tokens, heads * head_dim], and qkv [tokens, 3, heads, head_dim]"""
        qkv = torch.stack([self.query(hidden), self.key(hidden), self.value(hidden)], 1)
        qkv = qkv.unflatten(2, (-1, self.attention_head_size))
        p = rate(self.dropout, self)
        sequences = qkv, cu_seqlens, max_seqlen
        context = ops.attention(*sequences, dropout_p=p, seed=seed, seqused_k=seqused_k)
        return context.flatten(1), qkv


class BertOutput(nn.Module):
    """A linear layer and the LayerNorm behind its residual."""

    def __init__(self, size_in: int, config: "BertConfig") -> None:
        super().__init__()
        self.dense = nn.Linear(size_in, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        seed: torch.Tensor | None,
        number: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[n, size_in], [n, hidden] -> [n, hidden]"""
        x = _dropped(self.dropout, self.dense(x), seed, number)
        return self.LayerNorm(x + residual).to(residual.dtype)  # autocast may give it in fp32


class BertSelfOutput(BertOutput):
    pass


class BertAttention(nn.Module):
    def __init__(self, config: "BertConfig") -> None:
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertSelfOutput(config.hidden_size, config)

    def forward(
        self,
        hidden: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        seeds: Sequence[torch.Tensor | None],
        rows: torch.Tensor | None = None,
        number: torch.Tensor | None = None,
        seqused_k: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """-> [tokens or rows, hidden], and qkv [tokens, 3, heads, head_dim]"""
        context, qkv = self.self(hidden, cu_seqlens, max_seqlen, seeds[0], seqused_k)
        context, hidden = arithmetic.picked(rows, context, hidden)
        return self.output(context, hidden, seeds[1], number), qkv


class BertIntermediate(nn.Module):
    def __init__(self, config: "BertConfig") -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = activation(config)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden] -> [n, inner]"""
        return self.intermediate_act_fn(self.dense(hidden))


class BertLayer(nn.Module):
    def __init__(self, config: "BertConfig") -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config.intermediate_size, config)

    def forward(
        self,
        hidden: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        seeds: Sequence[torch.Tensor | None],
        rows: torch.Tensor | None = None,
        keep_qkv: bool = False,
        number: torch.Tensor | None = None,
        seqused_k: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """hidden, cu_seqlens, max_seqlen, rows, seqused_k: see `Batch`; seeds: int64 [DROPOUTS, 2].

        number: int64 [tokens], by which tokens draw their dropout behind the attention; None for
        their own order. Where it is given, the modules are called.

        Returns: [tokens or rows, hidden]; with keep_qkv a tuple of this and qkv.
        """
        by_modules = number is not None or watch.global_hooks()
        layer = None if by_modules else FAMILY.read(self)
        if isinstance(layer, Layer):
            batch = Batch(hidden, cu_seqlens, max_seqlen, seqused_k, rows, seeds=seeds)
            if keep_qkv:
                return operators.one(layer, batch, hidden, seeds, rows)
            return run([layer], batch)[0]
        hidden, qkv = self.attention(
            hidden, cu_seqlens, max_seqlen, seeds[:2], rows, number, seqused_k
        )
        out = self.output(self.intermediate(hidden), hidden, seeds[2], number)
        return (out, qkv) if keep_qkv else out


# The same names as transformers', so that the same table reads them.
FAMILY = bert_like(__name__, "Bert", dropout=Dropout)


class BertEncoder(Freezable, nn.Module):
    def __init__(self, config: "BertConfig") -> None:
        super().__init__()
        self.config = config
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False
        self.bertfast_graphs, self.bertfast_seen = Graphs(), watch.Seen()

    def forward(
        self,
        hidden: torch.Tensor,
        packing: Packing | PackedSequences,
        seeds: torch.Tensor | Sequence[torch.Tensor | None] | None,
        collect: Callable[..., object] | None = None,
        rows: torch.Tensor | None = None,
        keep_qkv: bool = False,
        number: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden [tokens, hidden] -> the same; `collect(hidden, qkv)` sees each layer's result.

        seeds: int64 [DROPOUTS * layers, 2]. rows: those of the result that are wanted, None for
        all. keep_qkv: whether `collect` gets more than None for qkv. number: see
        `BertLayer.forward`, for the last layer.
        """
        batch = Batch.of(hidden, packing, rows=rows, seeds=seeds)
        if self.packed is not None:
            by_layer = collect and (lambda states: collect(states, None))
            batch = batch._replace(seeds=None)  # one of each layer that is still there
            return self.packed.run(batch, self.training, by_layer, self.bertfast_graphs)
        checkpointing = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if collect is None and number is None and not checkpointing and not watch.global_hooks():
            layers = self.describe()
            if layers and not any([isinstance(layer, Unfit) for layer in layers]):
                return run(layers, batch, self.bertfast_graphs)[0]
        if self.layer:
            batch.check(self.config.hidden_size, values=unwatched())
        seeds = seeds.unbind() if isinstance(seeds, torch.Tensor) else seeds
        for i, layer in enumerate(self.layer):
            last = i == len(self.layer) - 1
            arguments = (hidden, *batch[1:3], of_layer(seeds, i), rows if last else None)
            arguments += (keep_qkv, number if last else None, batch.seqused_k)
            if checkpointing:
                # Seeds are arguments: equal masks need no RNG state, but those of others' dropouts.
                found = FAMILY.read(layer)
                foreign = isinstance(found, Unfit) or bool(found.adapters)
                out = checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=foreign)
            else:
                out = layer(*arguments)
            hidden, qkv = out if keep_qkv else (out, None)
            if collect is not None:
                collect(hidden, qkv)
        return hidden if self.layer or rows is None else hidden[rows]

    def sizes(self) -> tuple[int, int]:
        return self.config.hidden_size, self.config.num_attention_heads

    def read(self) -> list[Layer | Unfit]:
        layers = tuple(self.layer._modules.values())
        why = watch.limit(layers, (BertLayer,) * len(layers))
        return [why or FAMILY.read(layer) for layer in layers]

    def settings(self) -> "BertConfig":
        return self.config

    def extra_repr(self) -> str:
        return "" if self.packed is None else f"frozen: {self.packed}"


def looked_into(encoder: BertEncoder) -> bool:
    """Whether anyone could see which rows of an encoder's result aren't computed."""
    inside = [*encoder.layer.children()][-1:] if isinstance(encoder, BertEncoder) else []
    return watch.global_hooks() or watch.hooked(encoder) or any(map(watch.looked_into, inside))


class BertPooler(nn.Module):
    def __init__(self, config: "BertConfig") -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = nn.Tanh()

    def forward(self, first: torch.Tensor) -> torch.Tensor:
        """first [batch, hidden], the hidden state of column 0 -> [batch, hidden]"""
        return self.activation(self.dense(first))


def attention_probabilities(qkv: torch.Tensor, packing: Packing) -> torch.Tensor:
    """softmax(Q K^T / sqrt(d)) [batch, heads, seqlen, seqlen] for who asks to see it; zeros in
    padded rows. qkv [tokens, 3, heads, head_dim]. Before dropout."""
    query, key, _ = packing.unpack(qkv).unbind(2)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / qkv.shape[3] ** 0.5
    mask = packing.unpack(torch.ones(len(qkv), dtype=torch.bool, device=qkv.device))
    scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return torch.where(mask[:, None, :, None], scores.softmax(-1), 0)
