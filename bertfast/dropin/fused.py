"""What the families' fused classes share: one pack and one unpack, the layer, and its guards."""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from .. import ops
from ..model import live
from ..model.encoder import Packing, PaddedPacking
from ..model.layer import ACTIVATIONS, LayerOptions, LayerWeights, encoder_layer, rate
from ..model.watch import call_limit, hooked, limit
from . import readers
from .guards import asked, key_mask

_KERNELS = {type(ACT2FN[name]): kernel for name, kernel in ACTIVATIONS.items()}
FOREIGN = "{} is not a layer that bertfast knows"


class Parts(NamedTuple):
    """What a family's layer is made of. `parts` reads `_modules`: several times as fast as
    attributes, at every forward of every layer."""

    # query, key, value, projection, norm1, up, down, norm2: the order of `LayerWeights`
    weighted: tuple[nn.Module, ...]
    activation: nn.Module
    head_dim: int
    attention_dropout: float
    projection_dropout: float
    output_dropout: float
    # the other modules that a fused layer bypasses, each with the class it must have
    inside: tuple[tuple[nn.Module, type], ...]

    def arithmetic(self) -> tuple[LayerWeights, LayerOptions]:
        weights = LayerWeights(
            *(m._parameters[name] for m in self.weighted for name in ("weight", "bias"))
        )
        options = LayerOptions(
            weights.wq.shape[0] // self.head_dim,
            _KERNELS[type(self.activation)],
            self.weighted[4].eps,
            self.attention_dropout,
            self.projection_dropout,
            self.output_dropout,
        )
        return weights, options


_WEIGHTED = {
    "query": nn.Linear,
    "key": nn.Linear,
    "value": nn.Linear,
    "projection": nn.Linear,
    "norm1": nn.LayerNorm,
    "up": nn.Linear,
    "down": nn.Linear,
    "norm2": nn.LayerNorm,
}


class Call(NamedTuple):
    """One forward of an encoder, for its layers."""

    packing: Packing
    padded: bool  # whether each layer must return [batch, seqlen, hidden]: somebody looks
    unfused: list[str]  # the reasons of the layers that did not run fused


class FusedLayer:
    """Mixed into a family's layer class.

    Within a fused encoder's forward (`bertfast_call`) it takes hidden states in either form,
    [tokens, hidden] or [batch, seqlen, hidden], and returns the one it works on: packed where it
    runs fused, padded where its own class runs. Called by anyone else it is its own class.
    """

    in_tuple = False  # whether the family's layer returns (hidden states,)

    def forward(self, hidden_states, attention_mask=None, *args, **kwargs):
        call = kwargs.pop("bertfast_call", None)
        seeds = kwargs.pop("bertfast_seeds", None)
        if call is None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        packing, packed = call.packing, hidden_states.dim() == 2
        why, parts = self.inspect()
        if why:
            call.unfused.append(why)
            padded = packing.unpack(hidden_states) if packed else hidden_states
            return super().forward(padded, attention_mask, *args, **kwargs)
        hidden, _ = encoder_layer(
            hidden_states if packed else packing.pack(hidden_states),
            *(*parts.arithmetic(), packing.cu_seqlens, packing.seqlen, seeds),
            bias=self.bias(*args),
            keep_qkv=False,
            seqused_k=packing.seqused_k,
        )
        out = packing.unpack(hidden) if call.padded else hidden
        return (out,) if self.in_tuple else out

    def parts(self) -> Parts:
        raise NotImplementedError

    def bias(self, *args):
        """What the family adds to the scores, from the arguments its encoder passes to layers."""
        return None

    def inspect(self) -> tuple[str | None, Parts | None]:
        """(why this layer can't run fused now, or None; its parts). Asked at every forward."""
        try:
            parts = self.parts()
        except (AttributeError, KeyError) as e:
            return f"it is not built as its class is: {e!r}", None
        return self.limit(parts), parts

    def limit(self, parts: Parts) -> str | None:
        if getattr(self, "is_decoder", False) or getattr(self, "add_cross_attention", False):
            return "it is a decoder layer"
        if getattr(self, "chunk_size_feed_forward", 0):
            return "chunk_size_feed_forward is set"
        activation = type(parts.activation)
        if activation not in _KERNELS:
            return f"no kernel has its activation, {parts.activation!r}"
        modules, types = zip(*parts.inside, (parts.activation, activation), strict=True)
        why = limit(parts.weighted, tuple(_WEIGHTED.values()), _WEIGHTED) or limit(modules, types)
        if why:
            return why
        if parts.weighted[4].eps != parts.weighted[7].eps:
            return "its LayerNorms differ in eps"
        return None

    def reason(self) -> str | None:
        """Why this layer can't run fused now, or None."""
        return self.inspect()[0]


class BertLikeLayer(FusedLayer):
    """The layer of BERT, RoBERTa, XLM-RoBERTa, CamemBERT and ELECTRA."""

    classes: tuple[type, ...]  # of attention, its self and output, intermediate, output

    def parts(self) -> Parts:
        own = self._modules
        attention, up, down = own["attention"], own["intermediate"], own["output"]
        inner, projection = attention._modules["self"], attention._modules["output"]
        qkv, after, last = inner._modules, projection._modules, down._modules
        return Parts(
            (
                *(qkv["query"], qkv["key"], qkv["value"], after["dense"], after["LayerNorm"]),
                *(up._modules["dense"], last["dense"], last["LayerNorm"]),
            ),
            activation=up.intermediate_act_fn,
            head_dim=inner.attention_head_size,
            attention_dropout=rate(qkv["dropout"], inner),
            projection_dropout=rate(after["dropout"]),
            output_dropout=rate(last["dropout"]),
            inside=(
                *zip((attention, inner, projection, up, down), self.classes, strict=True),
                (after["dropout"], nn.Dropout),
                (last["dropout"], nn.Dropout),
            ),
        )


class FusedEncoder:
    """Mixed into a family's encoder class: one pack before the layers, one unpack after."""

    SETTINGS = ("bertfast_backend", "bertfast_fallback", "bertfast_padding", "bertfast_padded")
    bertfast_backend = "auto"
    bertfast_fallback = None  # why the last forward ran unfused, in all or some layers
    bertfast_padding = "auto"  # see `accelerate`
    bertfast_padded = None  # what the last forward's padded rows are, and why

    def forward(self, hidden_states, attention_mask=None, *args, **kwargs):
        forced = self.bertfast_backend
        with nullcontext() if forced == "auto" else ops.backend(forced):
            why, keys = self._limit(hidden_states, attention_mask, args, kwargs)
            if not why:
                watched = asked(self.settings(), kwargs, "output_hidden_states")
                watched = watched or any(map(hooked, self.layer))
                why, packing = self._packing(hidden_states, attention_mask, keys, watched)
            if why:
                self.bertfast_fallback, self.bertfast_padded = why, None
                return super().forward(hidden_states, attention_mask, *args, **kwargs)
            return self._fused(hidden_states, attention_mask, packing, watched, kwargs)

    def _packing(self, hidden_states, attention_mask, keys, watched):
        """(None, the call's packing: of real tokens, or with padded rows where somebody may read
        them), or (why not, None)."""
        batch, seqlen = hidden_states.shape[:2]
        packing = Packing(batch, seqlen, keys, hidden_states.device)
        self.bertfast_padded = None
        if len(packing.indices) == batch * seqlen:
            return None, packing
        if self.bertfast_padding == "zeros":
            self.bertfast_padded = "zeros, as asked"
            return None, packing
        if self.bertfast_padding == "stock":
            who = "whoever asked for it"
        else:
            who = "hidden states or a hook on a layer" if watched else readers.reader(packing)
            # A layer's own modules may be looked into, or mix rows.
            own = (type(m).__name__ for m in self.layer if m.reason())
            who = who or next(own, None)
        if who is None:
            self.bertfast_padded = "skipped: nobody reads them"
            return None, packing
        self.bertfast_padded = f"as in the stock model, for {who}"
        why = self.padding_limit(keys)
        if attention_mask.is_floating_point() and not bool(packing.cu_seqlens.diff().all()):
            why = "eager attention gives a sequence without a token the mean of its padding"
        return why, PaddedPacking(packing)

    def _fused(self, hidden_states, attention_mask, packing, watched, kwargs):
        device, dtype, count = hidden_states.device, hidden_states.dtype, len(self.layer)
        seeds = [None] * (3 * count)
        if self.training:
            seeds = ops.draw_seeds(3 * count, device)
        call = Call(packing, watched, [])
        hidden, states = hidden_states, [hidden_states]
        if torch.is_autocast_enabled(device.type):
            hidden = hidden.to(torch.get_autocast_dtype(device.type))
        given = self.layer_arguments(hidden_states)
        if not (call.padded or given):
            at_once = self._at_once(hidden, call.packing)
            if at_once is not None:
                self.bertfast_fallback = None
                return self.output(call.packing.unpack(at_once).to(dtype), states, kwargs)
        for i, layer in enumerate(self.layer):
            hidden = layer(
                *(hidden, attention_mask, *given),
                bertfast_call=call,
                bertfast_seeds=seeds[3 * i : 3 * i + 3],
                **kwargs,
            )
            if layer.in_tuple:
                hidden = hidden[0]
            if call.padded:
                states.append(hidden)
        self.bertfast_fallback = "; ".join(dict.fromkeys(call.unfused)) or None
        hidden = call.packing.unpack(hidden) if hidden.dim() == 2 else hidden
        return self.output(hidden.to(dtype), states, kwargs)

    def _at_once(self, hidden, packing):
        """hidden [batch, seqlen, hidden] through all layers by one call: [tokens, hidden], or None
        where that can't be."""
        if not live.serves(hidden):
            return None
        found = [layer.inspect() for layer in self.layer]
        if any(why for why, _ in found):
            return None
        weights, options = zip(*(parts.arithmetic() for _, parts in found), strict=True)
        hidden = packing.pack(hidden)
        if not live.can_run(weights, options, hidden, packing):
            return None
        return live.run(weights, options[0], hidden, packing)

    def settings(self):
        """The model's configuration."""
        return self.config

    def layer_arguments(self, hidden_states) -> tuple:
        """What the family's encoder gives its layers after the mask."""
        return ()

    def output(self, hidden, states, kwargs):
        """The encoder's result; `states` are all hidden states where they were asked for."""
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden)

    def mask_limit(self, keys) -> str | None:
        """Why the family can't run packed with the mask [batch, seqlen], or None."""
        return None

    def padding_limit(self, keys) -> str | None:
        """Why the family can't compute the padded rows of the mask [batch, seqlen], or None."""
        return None

    def _limit(self, hidden_states, attention_mask, args, kwargs):
        """(why this call can't be fused, None), or (None, the mask [batch, seqlen] or None)."""
        if not len(self.layer):
            return "it has no layers", None
        for layer in self.layer:
            if not isinstance(layer, FusedLayer):
                return FOREIGN.format(type(layer).__name__), None
            if "forward" in vars(layer):
                return "a layer has a forward of its own", None
        given = [*args, *(kwargs.get(n) for n in ("encoder_hidden_states", "past_key_values"))]
        if any(a is not None for a in given) or kwargs.get("use_cache"):
            return "it was called as a decoder", None
        if asked(self.settings(), kwargs, "output_attentions"):
            return "attention maps were asked for", None
        why = call_limit(hidden_states)
        if why:
            return why, None
        why, keys = key_mask(attention_mask, hidden_states)
        return why or (keys is not None and self.mask_limit(keys)) or None, keys
