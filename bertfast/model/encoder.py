"""Embeddings, layers and pooler, with transformers' names, on packed tokens inside."""

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..ops.library import call, unwatched
from ..ops.pack import gather
from . import live
from .layer import ACTIVATIONS, STATES, LayerOptions, LayerWeights, encoder_layer


class PackedSequences(NamedTuple):
    """All that the layers need of a `Packing`, for sequences that come packed."""

    cu_seqlens: torch.Tensor  # int32 [sequences + 1]
    seqlen: int  # the longest


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
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids, position_ids, token_type_ids, seed, inputs_embeds=None):
        """ids int64 [tokens] (inputs_embeds [tokens, hidden] for input_ids) -> [tokens, hidden]"""
        p = self.dropout.p if self.training else 0.0
        norm = self.LayerNorm
        if inputs_embeds is not None:
            x = inputs_embeds + self.position_embeddings(position_ids)
            x = x + self.token_type_embeddings(token_type_ids)
            weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
            return nn.functional.dropout(
                nn.functional.layer_norm(x, x.shape[-1:], weight, bias, norm.eps), p
            )
        return ops.embedding_layer_norm(
            *(input_ids, position_ids, token_type_ids),
            *(self.word_embeddings.weight, self.position_embeddings.weight),
            *(self.token_type_embeddings.weight, norm.weight, norm.bias, norm.eps),
            dropout_p=p,
            seed=seed,
        )


class BertSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        for name in ("query", "key", "value"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size))


class Projection(nn.Module):
    """A linear layer and the LayerNorm behind its residual: parameters only."""

    def __init__(self, size_in, config):
        super().__init__()
        self.dense = nn.Linear(size_in, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class BertAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = Projection(config.hidden_size, config)


class BertIntermediate(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)


class BertLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = Projection(config.intermediate_size, config)

    def weights(self) -> LayerWeights:
        inner, out = self.attention.self, self.attention.output
        modules = (inner.query, inner.key, inner.value, out.dense, out.LayerNorm)
        modules += (self.intermediate.dense, self.output.dense, self.output.LayerNorm)
        return LayerWeights(*(p for m in modules for p in (m.weight, m.bias)))

    def options(self) -> LayerOptions:
        config, on = self.config, self.training
        hidden_dropout = config.hidden_dropout_prob if on else 0.0
        return LayerOptions(
            config.num_attention_heads,
            ACTIVATIONS[config.hidden_act],
            config.layer_norm_eps,
            config.attention_probs_dropout_prob if on else 0.0,
            hidden_dropout,
            hidden_dropout,
        )

    def forward(self, hidden, cu_seqlens, max_seqlen, seeds, rows=None, keep_qkv=False):
        return encoder_layer(
            *(hidden, self.weights(), self.options(), cu_seqlens, max_seqlen, seeds, rows),
            keep_qkv=keep_qkv,
        )


def _plain(layer) -> bool:
    """Whether calling the layer would run `BertLayer.forward` and nothing else."""
    own = layer.__dict__
    return type(layer).forward is BertLayer.forward and not (
        own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own
    )


class BertEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def forward(self, hidden, packing: Packing | PackedSequences, seeds, collect=None, rows=None):
        """hidden [tokens, hidden] -> the same; `collect(hidden, qkv)` sees each layer's result.

        seeds: int64 [3 * layers, 2]. rows: those of the result that are wanted, None for all.
        """
        if collect is None and live.serves(hidden) and all(map(_plain, self.layer)):
            weights = [layer.weights() for layer in self.layer]
            options = [layer.options() for layer in self.layer]
            if live.can_run(weights, options, hidden):
                return live.run(weights, options[0], hidden, packing, rows)
        if self.layer:
            size = self.layer[0].config.hidden_size
            given = hidden, size, packing.cu_seqlens, packing.seqlen, rows
            STATES.check(given, values=unwatched())
        seeds = seeds.unbind() if isinstance(seeds, torch.Tensor) else seeds
        for i, layer in enumerate(self.layer):
            arguments = (hidden, packing.cu_seqlens, packing.seqlen, seeds[3 * i : 3 * i + 3])
            last = i == len(self.layer) - 1
            arguments += (rows if last else None, collect is not None)
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                # The seeds are arguments: no RNG state needs keeping for equal dropout masks.
                hidden, qkv = checkpoint(
                    layer, *arguments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden, qkv = layer(*arguments)
            if collect is not None:
                collect(hidden, qkv)
        return hidden


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
