"""A decoder's steps with a cache, a token of every row at a time, by torch; see steps_cpu.py.

A step launches as little as it can: on a CPU half of a small model's is Python. So plain linear
layers and norms are called as functions, read once when decoding begins; others as modules.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from ..encoder.layer import _ACTIVATE
from ..families.family import kernel_of
from .decoder import BertLMHeadModel, Sequences, plain
from .encoder import BertEmbeddings
from .heads import BertLMPredictionHead, BertOnlyMLMHead, BertPredictionHeadTransform

ROOM = 32  # steps that the cache grows by


class Steps:
    """[rows] -> logits [rows, vocabulary], the rows of a source side by side. count: of sources.

    The keys and values of a source are made once, and all its rows read them where they are. No
    weight may change meanwhile.
    """

    def __init__(self, decoder: BertLMHeadModel, sources: Sequences, each: int, most: int) -> None:
        """each: rows of a source. most: steps at most."""
        lengths = sources.cu_seqlens.diff().long()
        self.count, self.device = count, device = len(lengths), lengths.device
        self.each, self.most, self.done = each, most, 0
        real = torch.arange(sources.longest, device=device) < lengths.unsqueeze(1)
        bert, places = decoder.bert, real.flatten().nonzero().squeeze(1)
        shape = count, sources.longest
        heads = decoder.config.num_attention_heads
        self.layers = [_Layer(m, sources.values, places, shape, heads) for m in bert.encoder.layer]
        # Of a source without tokens nothing is masked: its values are zeros.
        masked = ~real & real.any(1, keepdim=True)
        dtype = sources.values.dtype
        self.mask = torch.zeros(shape, dtype=dtype, device=device).masked_fill(masked, -torch.inf)
        self.mask = None if not masked.any() else self.mask[:, None, None]
        self.embed, self.head = embedding(bert.embeddings), _head(decoder.cls)
        self.heads = heads

    def select(self, rows: torch.Tensor, sources: torch.Tensor | None = None) -> None:
        """Goes on with these rows, int64 [n], some perhaps twice; and with these sources, int64
        [n / each], in the order of their rows; None for all."""
        for layer in self.layers:
            layer.cache = layer.cache.index_select(0, rows)
            if sources is not None:
                layer.keys, layer.values = layer.keys[sources], layer.values[sources]
        if sources is not None and self.mask is not None:
            self.mask = self.mask[sources]

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 [rows], the last token of each -> logits [rows, vocabulary]"""
        hidden = self.embed(ids, self.done)
        rows, size = hidden.shape
        shape, end = (rows, 3, self.heads, size // self.heads), self.done + 1
        beams = rows // self.each, self.each, self.heads, size // self.heads
        attention = F.scaled_dot_product_attention
        for layer in self.layers:
            qkv = layer.qkv(hidden).view(shape)
            cache = layer.room(rows, self.done, self.most, qkv)
            cache[:, :, :, self.done] = qkv[:, 1:]
            keys, values = cache[:, 0, :, :end], cache[:, 1, :, :end]
            context = attention(qkv[:, 0].unsqueeze(2), keys, values)
            hidden = layer.norm1(layer.out1(context.view(rows, size)), hidden)
            query = layer.query(hidden).view(beams).transpose(1, 2)
            context = attention(query, layer.keys, layer.values, self.mask).transpose(1, 2)
            hidden = layer.norm2(layer.out2(context.reshape(rows, size)), hidden)
            hidden = layer.norm3(layer.down(layer.up(hidden)), hidden)
        self.done = end
        return self.head(hidden)

    def best(self, ids: torch.Tensor) -> torch.Tensor:
        """The likeliest token of each row, int64 [rows], the first of several."""
        return self(ids).argmax(1)


class _Layer:
    """A layer's functions; the keys and values of the sources, [sources, heads, longest, head_dim],
    zeros at padding; and what it has seen, [rows, 2, heads, room, head_dim]."""

    cache = None

    def __init__(self, layer, states, places, shape, heads):
        """states [tokens, hidden], at `places` int64 [tokens] of the flattened `shape`."""
        own, cross = layer.attention, layer.crossattention
        self.qkv = _together(own.self.query, own.self.key, own.self.value)
        self.query = _product(cross.self.query)
        kv = cross.self.keys_values(states)
        padded = kv.new_zeros((shape[0] * shape[1], *kv.shape[1:])).index_copy(0, places, kv)
        padded = padded.view(*shape, *kv.shape[1:]).permute(2, 0, 3, 1, 4).contiguous()
        self.keys, self.values = padded.unbind(0)
        self.out1, self.norm1 = _output(own.output)
        self.out2, self.norm2 = _output(cross.output)
        up = layer.intermediate
        self.up = _activated(up.dense, up.intermediate_act_fn)
        self.down, self.norm3 = _output(layer.output)

    def room(self, rows, done, most, like):
        """The cache, with room for another step."""
        if self.cache is None or done == self.cache.shape[3]:
            room = min(most, done + ROOM)
            cache = like.new_empty((rows, 2, like.shape[2], room, like.shape[3]))
            if self.cache is not None:
                cache[:, :, :, :done] = self.cache
            self.cache = cache
        return self.cache


def _product(linear: nn.Module):
    if plain((linear,), nn.Linear):
        return partial(F.linear, weight=linear.weight, bias=linear.bias)
    return linear


def _together(*linears):
    """Several as one: [n, in] -> [n, all outs]."""
    if plain(linears, nn.Linear):
        weight, bias = (torch.cat([getattr(m, p) for m in linears]) for p in ("weight", "bias"))
        return partial(F.linear, weight=weight, bias=bias)
    return lambda x: torch.cat([linear(x) for linear in linears], 1)


def _activated(dense: nn.Module, act: nn.Module):
    product, kernel = _product(dense), kernel_of(act)
    act = _ACTIVATE[kernel] if kernel is not None and plain((act,), type(act)) else act
    return lambda x: act(product(x))


def _norm(norm: nn.Module):
    if plain((norm,), nn.LayerNorm):
        return partial(_layer_norm, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return norm


def _layer_norm(shape, weight, bias, eps, x):
    return F.layer_norm(x, shape, weight, bias, eps)


def _output(output):
    norm = _norm(output.LayerNorm)
    return _product(output.dense), lambda x, residual: norm(x + residual)


def embedding(embeddings: nn.Module) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """(ids int64 [rows], the position of all of them) -> [rows, hidden]"""
    tables = embeddings.tables() if type(embeddings) is BertEmbeddings else None
    if tables is None:
        return lambda ids, at: embeddings(
            ids, torch.full_like(ids, at), torch.zeros_like(ids), None
        )
    words, positions, types, *_ = tables
    places, norm = positions + types[0], _norm(embeddings.LayerNorm)
    return lambda ids, at: norm(F.embedding(ids, words) + places[at])


def _head(head: nn.Module):
    predictions = getattr(head, "predictions", None)
    decoder = getattr(predictions, "decoder", None)
    if not plain((head, predictions, decoder), BertOnlyMLMHead, BertLMPredictionHead, nn.Linear):
        return head
    transform, product = _transform(predictions.transform), _product(decoder)
    return lambda x: product(transform(x))


def _transform(transform: nn.Module):
    if not plain((transform,), BertPredictionHeadTransform):
        return transform
    inner, norm = (
        _activated(transform.dense, transform.transform_act_fn),
        _norm(transform.LayerNorm),
    )
    return lambda x: norm(inner(x))
