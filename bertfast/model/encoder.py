"""Embeddings, layers and pooler, with transformers' names, on packed tokens inside.

Calling the modules one by one, in plain PyTorch, is the definition; kernels take their place where
nobody could tell (watch.py). A hook or an adapter sees [tokens, hidden], without the padding.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..ops.dropout import dropped
from ..ops.library import call, unwatched
from ..ops.pack import gather
from . import live, watch
from .layer import ACTIVATIONS, FUNCTIONS, STATES, LayerOptions, LayerWeights, encoder_layer, rate


class PackedSequences(NamedTuple):
    """All that the layers need of a `Packing`, for sequences that come packed."""

    cu_seqlens: torch.Tensor  # int32 [sequences + 1]
    seqlen: int  # the longest
    seqused_k: torch.Tensor | None = None  # int32 [sequences], see `ops.attention`


def check_mask(attention_mask, batch: int, seqlen: int):
    if attention_mask is not None and attention_mask.shape != (batch, seqlen):
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}, expected "
            f"[{batch}, {seqlen}] as the input: one 0 or 1 for each token"
        )


class Packing:
    """Where the real tokens of a padded batch are; made once for a forward.

    attention_mask [batch, seqlen], 0 at padding, None for none.
    """

    seqused_k = None

    def __init__(self, batch: int, seqlen: int, attention_mask, device):
        if attention_mask is None:
            attention_mask = torch.ones((batch, seqlen), dtype=torch.bool, device=device)
        check_mask(attention_mask, batch, seqlen)
        if attention_mask.device.type != torch.device(device).type:
            raise ValueError(
                f"attention_mask is on {attention_mask.device}, expected {device} as the input"
            )
        self.batch, self.seqlen, self.mask = batch, seqlen, attention_mask
        self.indices, self.cu_seqlens = call("pack_indices", attention_mask, None)

    def pack(self, x):
        """[batch, seqlen, ...] -> [tokens, ...]"""
        return gather(x, self.indices)

    def unpack(self, x):
        """[tokens, ...] -> [batch, seqlen, ...], zeros at the padding."""
        return ops.unpack(x, self.indices, self.batch, self.seqlen)

    def first_rows(self, tokens: int):
        """int64 [batch]: where column 0 is among the tokens; any row where it is padding."""
        return self.cu_seqlens[:-1].long().clamp(max=tokens - 1)

    def zero_padded(self, first):
        """[batch, hidden], rows of `first_rows` -> the same, zeros where column 0 is padding."""
        return torch.where((self.mask[:, 0] != 0).unsqueeze(1), first, 0)

    def first(self, x):
        """[tokens, hidden] -> [batch, hidden]: column 0 of `unpack`, without making the rest."""
        if not torch.compiler.is_compiling() and x.shape[0] == 0:
            return x.new_zeros((self.batch, x.shape[1]))
        return self.zero_padded(x[self.first_rows(x.shape[0])])


class PaddedPacking(Packing):
    """All rows of a padded batch: a sequence's real tokens, then its padding, whose rows are
    queries alone. For who reads what the layers make of them.

    packing: that of the real tokens.
    """

    def __init__(self, packing: Packing):
        self.batch, self.seqlen, self.mask = packing.batch, packing.seqlen, packing.mask
        self.seqused_k = packing.cu_seqlens.diff()
        padding = (self.mask == 0).to(torch.uint8)
        rows = padding.argsort(dim=1, stable=True)
        starts = torch.arange(self.batch + 1, device=rows.device) * self.seqlen
        self.indices, self.cu_seqlens = (rows + starts[:-1, None]).flatten(), starts.int()


class Dropout(nn.Dropout):
    """Its mask is the kernels', drawn by a seed."""

    def forward(self, x, seed=None, number=None):
        """x [n, hidden], seed int64 [2], number int64 [n]: see `BertLayer.forward`."""
        return dropped(x, rate(self), seed, number)


def _dropped(dropout, x, *seed):
    """By a module that may be another in the place of ours."""
    return dropout(x, *seed) if isinstance(dropout, Dropout) else dropout(x)


class BertEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        size = config.hidden_size
        self.word_embeddings = nn.Embedding(
            config.vocab_size, size, padding_idx=config.pad_token_id
        )
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def tables(self):
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

    def forward(self, input_ids, position_ids, token_type_ids, seed, inputs_embeds=None):
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
    def __init__(self, config):
        super().__init__()
        self.config = config
        for name in ("query", "key", "value"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size))
        self.dropout = Dropout(config.attention_probs_dropout_prob)

    @property
    def attention_head_size(self) -> int:
        return self.config.hidden_size // self.config.num_attention_heads

    def forward(self, hidden, cu_seqlens, max_seqlen, seed):
        """-> [tokens, heads * head_dim], and qkv [tokens, 3, heads, head_dim]"""
        qkv = torch.stack([self.query(hidden), self.key(hidden), self.value(hidden)], 1)
        qkv = qkv.unflatten(2, (-1, self.attention_head_size))
        p = rate(self.dropout, self)
        return ops.attention(qkv, cu_seqlens, max_seqlen, dropout_p=p, seed=seed).flatten(1), qkv


class Projection(nn.Module):
    """A linear layer and the LayerNorm behind its residual."""

    def __init__(self, size_in, config):
        super().__init__()
        self.dense = nn.Linear(size_in, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, x, residual, seed, number=None):
        """[n, size_in], [n, hidden] -> [n, hidden]"""
        x = _dropped(self.dropout, self.dense(x), seed, number)
        return self.LayerNorm(x + residual).to(residual.dtype)  # autocast may give it in fp32


class BertAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = Projection(config.hidden_size, config)

    def forward(self, hidden, cu_seqlens, max_seqlen, seeds, rows=None, number=None):
        """-> [tokens or rows, hidden], and qkv [tokens, 3, heads, head_dim]"""
        context, qkv = self.self(hidden, cu_seqlens, max_seqlen, seeds[0])
        if rows is not None:
            context, hidden = context.index_select(0, rows), hidden.index_select(0, rows)
        return self.output(context, hidden, seeds[1], number), qkv


class BertIntermediate(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, hidden):
        """[n, hidden] -> [n, inner]"""
        return FUNCTIONS[ACTIVATIONS[self.config.hidden_act]](self.dense(hidden))


class BertLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = Projection(config.intermediate_size, config)

    def arithmetic(self) -> tuple[LayerWeights, LayerOptions] | None:
        """What kernels take to do all that calling the modules inside would; None where that may
        be something else. Asked at every forward."""
        try:
            own = self._modules
            attention, up, down = own["attention"], own["intermediate"], own["output"]
            inner, out = attention._modules["self"], attention._modules["output"]
            qkv, after, last = inner._modules, out._modules, down._modules
            weighted = (qkv["query"], qkv["key"], qkv["value"], after["dense"], after["LayerNorm"])
            weighted += (up._modules["dense"], last["dense"], last["LayerNorm"])
            drops = qkv["dropout"], after["dropout"], last["dropout"]
        except (AttributeError, KeyError):  # other modules in their places
            return None
        norm1, norm2 = weighted[4], weighted[7]
        modules = (*weighted, attention, inner, out, up, down, *drops)
        if watch.limit(modules, _LAYER) or norm1.eps != norm2.eps:
            return None
        found = [m._parameters[name] for m in weighted for name in ("weight", "bias")]
        options = LayerOptions(
            found[0].shape[0] // inner.attention_head_size,
            ACTIVATIONS[self.config.hidden_act],
            norm1.eps,
            rate(drops[0], inner),
            rate(drops[1]),
            rate(drops[2]),
        )
        return LayerWeights(*found), options

    def forward(
        self, hidden, cu_seqlens, max_seqlen, seeds, rows=None, keep_qkv=False, number=None
    ):
        """hidden [tokens, hidden], cu_seqlens, max_seqlen, seeds, rows: see `encoder_layer`.

        number: int64 [tokens], by which tokens draw their dropout behind the attention; None for
        their own order. Where it is given, the modules are called.

        Returns: [tokens or rows, hidden]; with keep_qkv a tuple of this and qkv.
        """
        by_modules = number is not None or watch.global_hooks()
        kernels = None if by_modules else self.arithmetic()
        if kernels is not None:
            out, qkv = encoder_layer(
                hidden, *kernels, cu_seqlens, max_seqlen, seeds, rows, keep_qkv=keep_qkv
            )
        else:
            hidden, qkv = self.attention(hidden, cu_seqlens, max_seqlen, seeds[:2], rows, number)
            out = self.output(self.intermediate(hidden), hidden, seeds[2], number)
        return (out, qkv) if keep_qkv else out


_LAYER = (nn.Linear,) * 4 + (nn.LayerNorm,) + (nn.Linear,) * 2 + (nn.LayerNorm,)
_LAYER += (BertAttention, BertSelfAttention, Projection, BertIntermediate, Projection)
_LAYER += (Dropout,) * 3


class BertEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.hidden_size = config.hidden_size
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden,
        packing: Packing | PackedSequences,
        seeds,
        collect=None,
        rows=None,
        keep_qkv=False,
        number=None,
    ):
        """hidden [tokens, hidden] -> the same; `collect(hidden, qkv)` sees each layer's result.

        seeds: int64 [3 * layers, 2]. rows: those of the result that are wanted, None for all.
        keep_qkv: whether `collect` gets more than None for qkv. number: see `BertLayer.forward`,
        for the last layer.
        """
        if collect is None and live.serves(hidden):
            found = self._arithmetic()
            if found is not None:
                weights, options = found
                if live.can_run(weights, options, hidden, packing):
                    return live.run(weights, options[0], hidden, packing, rows)
        if self.layer:
            given = (
                hidden,
                self.hidden_size,
                packing.cu_seqlens,
                packing.seqlen,
                packing.seqused_k,
                rows,
            )
            STATES.check(given, values=unwatched())
        seeds = seeds.unbind() if isinstance(seeds, torch.Tensor) else seeds
        for i, layer in enumerate(self.layer):
            last = i == len(self.layer) - 1
            arguments = (hidden, packing.cu_seqlens, packing.seqlen, seeds[3 * i : 3 * i + 3])
            arguments += (rows if last else None, keep_qkv, number if last else None)
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                # The seeds are arguments: no RNG state needs keeping for equal dropout masks.
                out = checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                out = layer(*arguments)
            hidden, qkv = out if keep_qkv else (out, None)
            if collect is not None:
                collect(hidden, qkv)
        return hidden

    def _arithmetic(self):
        """All layers' weights and options, where nobody could tell; or None."""
        layers = tuple(self.layer._modules.values())
        if not layers or watch.limit(layers, (BertLayer,) * len(layers)):
            return None
        found = [layer.arithmetic() for layer in layers]
        return None if None in found else tuple(zip(*found, strict=True))


ENCODER_TYPES = {BertEncoder, nn.ModuleList, BertLayer, *_LAYER}


def looked_into(encoder) -> bool:
    """Whether anyone could see which rows of an encoder's result aren't computed."""
    inside = [*encoder.layer.children()][-1:] if isinstance(encoder, BertEncoder) else []
    return watch.global_hooks() or watch.hooked(encoder) or any(map(watch.looked_into, inside))


class BertPooler(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first):
        """first [batch, hidden], the hidden state of column 0 -> [batch, hidden]"""
        return torch.tanh(self.dense(first))


def attention_probabilities(qkv, packing: Packing):
    """softmax(Q K^T / sqrt(d)) [batch, heads, seqlen, seqlen] for who asks to see it; zeros in
    padded rows. qkv [tokens, 3, heads, head_dim]. Before dropout."""
    query, key, _ = packing.unpack(qkv).unbind(2)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / qkv.shape[3] ** 0.5
    mask = packing.mask != 0
    scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return torch.where(mask[:, None, :, None], scores.softmax(-1), 0)
