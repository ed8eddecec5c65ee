"""A decoder's steps on a CPU in fp32, each of which is one call into C++ on packed weights."""

from array import array
from typing import Any

import torch
from torch import nn

from ..encoder.executors.whole_cpu import c_spec
from ..encoder.packed_cpu import pack
from ..encoder.spec import LayerSpec
from ..families.family import kernel_of
from ..ops import registry
from ..ops.extension import C
from ..ops.library import ptr
from .decoder import BertLMHeadModel, Sequences, plain
from .heads import BertLMPredictionHead, BertOnlyMLMHead, BertPredictionHeadTransform
from .steps import ROOM, Steps, embedding


def steps_of(
    decoder: BertLMHeadModel, sources: Sequences, each: int, most: int
) -> "Steps | CpuSteps":
    """The quickest that the decoder allows; see `Steps`."""
    modules = _modules(decoder, sources.values)
    if modules is None:
        return Steps(decoder, sources, each, most)
    return CpuSteps(decoder, modules, sources, each, most)


def _modules(decoder, states) -> list[tuple] | None:
    """Of each layer and of the head the linear layers, the norms and the activation; None where
    somebody must see the modules at work, or what they work on is no fp32 on a CPU."""
    found, head = [], decoder.cls
    for layer in decoder.bert.encoder.layer:
        own, cross, up, down = (
            *(layer.attention, layer.crossattention),
            *(layer.intermediate, layer.output),
        )
        linears = own.self.query, own.self.key, own.self.value, own.output.dense
        linears += cross.self.query, cross.output.dense, up.dense, down.dense
        norms = own.output.LayerNorm, cross.output.LayerNorm, down.LayerNorm
        found.append((linears, norms, up.intermediate_act_fn))
    predictions = getattr(head, "predictions", None)
    transform = getattr(predictions, "transform", None)
    kinds = BertOnlyMLMHead, BertLMPredictionHead, BertPredictionHeadTransform
    if not plain((head, predictions, transform), *kinds):
        return None
    linears = transform.dense, predictions.decoder
    found.append((linears, (transform.LayerNorm,), transform.transform_act_fn))
    every = [m for linears, norms, _ in found for m in linears]
    norms = [m for _, norms, _ in found for m in norms]
    acts = [act for *_, act in found]
    kernels = {*map(kernel_of, acts)}
    parameters = [p for m in (*every, *norms) for p in m.parameters()]
    fit = (
        C is not None
        and registry.forced() in (None, "cpu")
        and not torch.is_autocast_enabled("cpu")
        and {(t.dtype, t.device.type) for t in (states, *parameters)} == {(torch.float32, "cpu")}
        and plain(tuple(every), nn.Linear)
        and plain(tuple(norms), nn.LayerNorm)
        and all(plain((act,), type(act)) for act in acts)
        and len(kernels) == 1
        and None not in kernels
        and len({norm.eps for norm in norms}) == 1
    )
    return found if fit else None


class CpuSteps:
    """As `Steps`, whose methods it has, of what `_modules` found. The keys and values
    of what was decoded stay where they are: a row knows in which slot each of its tokens is, so
    that beams move for free."""

    def __init__(
        self, decoder: BertLMHeadModel, modules: Any, sources: Sequences, each: int, most: int
    ) -> None:
        *layers, head = modules
        self.count, self.device = len(sources.cu_seqlens) - 1, sources.values.device
        self.each, self.most, self.done = each, most, 0
        self.slots = rows = self.count * each
        self.source = torch.arange(self.count, dtype=torch.int32).repeat_interleave(each)
        self.origin = torch.empty((rows, most), dtype=torch.int32)
        self.sources = sources._replace(cu_seqlens=sources.cu_seqlens.contiguous())
        self.embed, self.kept = embedding(decoder.bert.embeddings), []
        config, (_, norms, act) = decoder.config, head
        hidden, heads = config.hidden_size, config.num_attention_heads
        spec = LayerSpec(
            *(hidden, heads, hidden // heads, config.intermediate_size),
            *(kernel_of(act), norms[0].eps),
        )
        self.spec, self.layers = c_spec(spec), array("q")
        for own, layer in zip(layers, decoder.bert.encoder.layer, strict=True):
            keys = layer.crossattention.self.keys_values(sources.values)
            parts = self._layer(*own[:2]) | {"keys": self._keep(keys)}
            self.layers.extend(parts[name] for name in C.DECODER_PARTS)
        self.layer_count = len(layers)
        (dense, words), (norm,), _ = head
        self.head = [self._pack(dense), self._pack(words)]
        self.head.append(tuple(map(self._keep, (norm.weight, norm.bias))))
        self.words = words.out_features
        self.cache = torch.empty((self.layer_count, 0, self.slots, 2, hidden))

    def _keep(self, t) -> int:
        t = t.detach().contiguous()
        self.kept.append(t)
        return t.data_ptr()

    def _pack(self, *linears) -> int:
        return self._keep(pack([(m.weight, m.bias) for m in linears], "fp32"))

    def _layer(self, linears, norms) -> dict[str, int]:
        *qkv, out, query, cross, up, down = linears
        parts = {"qkv": self._pack(*qkv), "out": self._pack(out), "query": self._pack(query)}
        parts |= {"cross": self._pack(cross), "up": self._pack(up), "down": self._pack(down)}
        for i, norm in enumerate(norms, 1):
            parts |= {f"norm{i}.{name}": self._keep(p) for name, p in norm.named_parameters()}
        return parts

    def select(self, rows: torch.Tensor, sources: torch.Tensor | None = None) -> None:
        self.origin, self.source = self.origin[rows], self.source[rows]

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        logits = torch.empty((len(ids), self.words))
        self._step(ids, logits, None)
        return logits

    def best(self, ids: torch.Tensor) -> torch.Tensor:
        found = torch.empty_like(ids)
        self._step(ids, None, found)
        return found

    def _step(self, ids, logits, best):
        hidden, rows = self.embed(ids, self.done).contiguous(), len(ids)
        room = self.cache.shape[1]
        if self.done == room:
            more = self.cache.new_empty((self.layer_count, room + ROOM, *self.cache.shape[2:]))
            more[:, :room] = self.cache
            self.cache, room = more, room + ROOM
        C.decode(
            *(self.layers.buffer_info()[0], self.layer_count, self.spec, rows),
            *(ptr(hidden), ptr(self.cache), room, self.slots, self.done),
            *(ptr(self.origin), self.most, ptr(self.source)),
            *(ptr(self.sources.cu_seqlens), self.sources.longest),
            *(*self.head, self.words, ptr(logits), ptr(best)),
        )
        self.origin[:, self.done] = torch.arange(rows, dtype=torch.int32)
        self.done += 1
