"""What takes the place of a family's classes: one pack and one unpack, and the guards of a call."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from .. import ops
from ..encoder import Batch, Layer, Unfit, run
from ..encoder.batch import Packing, PaddedPacking, ZerosPacking, lowered
from ..encoder.packed import Freezable, Mixed
from ..encoder.run import Choice
from ..encoder.spec import DROPOUTS, of_layer
from ..encoder.watch import call_limit, class_name, hooked, outside_graphs, untouched
from ..families import Family
from . import readers
from .guards import asked, key_mask

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FOREIGN = "{} is not a layer that bertfast knows"


class Call(NamedTuple):
    """One forward of an encoder, for its layers."""

    packing: Packing
    more: dict  # of its `Batch`
    dtype: torch.dtype  # of what padded layers return
    padded: bool  # whether each layer must return [batch, seqlen, hidden]: somebody looks
    ran: list[Unfit | Choice]  # of each layer: why it didn't run fused, or who ran it


class Last(NamedTuple):
    """What became of an encoder's last forward."""

    fallback: str | None = None  # why it ran unfused, in all or some layers
    executor: str | None = None  # who ran the fused ones, and why nobody faster
    padded: str | None = None  # what padded rows are, and why; None without any


class FusedLayer(Mixed):
    """Mixed into a family's layer class.

    Within a fused encoder's forward (`bertfast_call`) it takes hidden states in either form,
    [tokens, hidden] or [batch, seqlen, hidden], and returns the one it works on: packed where it
    runs fused, padded where its own class runs. Called by anyone else it is its own class.
    """

    family: Family

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        call = kwargs.pop("bertfast_call", None)
        seeds = kwargs.pop("bertfast_seeds", None)
        if call is None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        packing, packed = call.packing, hidden_states.dim() == 2
        layer = self.describe()
        if isinstance(layer, Unfit):
            call.ran.append(layer)
            padded = packing.unpack(hidden_states) if packed else hidden_states
            return super().forward(padded, attention_mask, *args, **kwargs)
        hidden = hidden_states if packed else packing.pack(lowered(hidden_states))
        hidden, choice = run([layer], Batch.of(hidden, packing, seeds=seeds, **call.more))
        call.ran.append(choice)
        out = packing.unpack(hidden).to(call.dtype) if call.padded else hidden
        return out if self.family.tail is None else (out, *self.family.tail)

    def describe(self) -> Layer | Unfit:
        return self.family.read(self)


class FusedEncoder(Freezable):
    """Mixed into a family's encoder class: one pack before the layers, one unpack after."""

    SETTINGS = ("bertfast_backend", "bertfast_padding", "bertfast_last")
    SETTINGS += ("bertfast_graphs", "bertfast_seen")
    family: Family
    bertfast_backend = "auto"
    bertfast_last = Last()

    @outside_graphs
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        out = self.fused(hidden_states, attention_mask, args, kwargs)
        if out is None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        hidden, states = out
        return self.family.output(hidden, states, kwargs)

    def fused(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """(hidden states, those of all layers where they were asked for), or None for a call that
        the stock class must serve."""
        forced = self.bertfast_backend
        with nullcontext() if forced == "auto" else ops.backend(forced):
            why, keys = self.limit(hidden_states, attention_mask, args, kwargs)
            if why is None:
                watched = self.states_asked(kwargs) or any(map(hooked, self.layer))
                found = self.describe()
                why, packing, padded = self._packing(
                    hidden_states, attention_mask, keys, watched, found
                )
            if why is None:
                hidden_states = self.family.entry(self, hidden_states)
                return self._fused(
                    hidden_states, attention_mask, packing, padded, watched, found, kwargs
                )
            self.bertfast_last = Last(fallback=why)
            if self.packed is not None:
                raise RuntimeError(f"a frozen encoder can't serve this call: {why}")
            return None

    def states_asked(self, kwargs: dict[str, Any]) -> bool:
        """Whether somebody gets the states of all layers."""
        read = self.family.reads_states
        if read is None:
            return asked(self.settings(), kwargs, "output_hidden_states")
        base = self.family.named(self.family.readers.base)
        return kwargs.get("output_hidden_states", True) and readers.states_read(base, read)

    def read(self) -> list[Layer | Unfit]:
        why = self.family.limit(self)
        return [Unfit("", why) if why else layer.describe() for layer in self.layer]

    def _packing(self, hidden_states, attention_mask, keys, watched, found):
        """(None, the call's packing: of real tokens, or with padded rows where somebody may read
        them, what they are), or (why not, None, None)."""
        batch, seqlen = hidden_states.shape[:2]
        packing = Packing(batch, seqlen, keys, hidden_states.device)
        if packing.indices is None or len(packing.indices) == batch * seqlen:
            return None, packing, None
        if self.bertfast_padding == "zeros":
            return None, packing, "zeros, as asked"
        if self.bertfast_padding == "stock":
            who = "whoever asked for it"
        else:
            who = "hidden states or a hook on a layer" if watched else readers.reader(packing)
            # A layer's own modules may be looked into, or mix rows.
            own = [type(m).__name__ for m, f in zip(self.layer, found) if isinstance(f, Unfit)]  # noqa: B905
            who = who or next(iter(own), None) or self._last_touched()
        if who is None:
            return None, packing, "skipped: nobody reads them"
        said = f"as in the stock model, for {who}"
        if self.family.even:
            zeros = self._alike(watched, found) and not bool(
                hidden_states.masked_fill(keys.unsqueeze(-1) != 0, 0).any()
            )
            said += ", one for all of a sequence's" * zeros
            return None, ZerosPacking(packing) if zeros else PaddedPacking(packing, True), said
        why = self.family.padding_limit(keys)
        if attention_mask.is_floating_point() and not bool(packing.cu_seqlens.diff().all()):
            why = "eager attention gives a sequence without a token the mean of its padding"
        return why, PaddedPacking(packing), said

    def _alike(self, watched, found) -> bool:
        """Whether rows that come alike, and see alike, leave so, and nobody takes gradients."""
        if self.packed is not None:
            return True
        if torch.is_grad_enabled() or self._by_modules(watched, found):
            return False
        return not any([any(layer.dropout) or layer.adapters for layer in found])

    def _fused(self, hidden_states, attention_mask, packing, padded, watched, found, kwargs):
        device, dtype, count = hidden_states.device, hidden_states.dtype, len(found)
        if device.type == "cuda" and torch.is_autocast_enabled("cuda"):
            dtype = torch.float32  # of a layer norm there
        hidden, states = lowered(hidden_states), [hidden_states]
        more = self.more(hidden, packing, kwargs)
        seeds = ops.draw_seeds(DROPOUTS * count, device) if self.training and count else None
        if self.packed is not None:
            batch = Batch.of(packing.pack(hidden), packing, **more)
            collect = (lambda t: states.append(packing.unpack(t).to(dtype))) if watched else None
            hidden = self.packed.run(batch, self.training, collect, self.bertfast_graphs)
            ran = [self.packed.choice]
        elif self._by_modules(watched, found):
            call = Call(packing, more, dtype, watched, [])
            hidden = hidden_states if watched else hidden
            told = self.arguments(attention_mask, more, kwargs)
            for i, layer in enumerate(self.layer):
                own = None if seeds is None else of_layer(seeds, i)
                args, given = told(layer)
                hidden = layer(hidden, *args, bertfast_call=call, bertfast_seeds=own, **given)
                if self.family.tail is not None:
                    hidden = hidden[0]
                if watched:
                    states.append(hidden)
            ran = call.ran
        else:
            batch = Batch.of(packing.pack(hidden), packing, seeds=seeds, **more)
            hidden, choice = run(found, batch, self.bertfast_graphs)
            ran = [choice]
        by = {str(one): isinstance(one, Choice) for one in ran}
        self.bertfast_last = Last(
            "; ".join(text for text, fused in by.items() if not fused) or None,
            "; ".join(text for text, fused in by.items() if fused) or None,
            padded,
        )
        if self.family.last is not None:
            hidden = self._last(hidden.to(dtype), packing)
        hidden = packing.unpack(hidden) if hidden.dim() == 2 else hidden
        hidden = hidden.to(dtype)
        return hidden, states if watched else [hidden]

    def _last(self, hidden, packing):
        """The norm behind the layers: padded states for who looks, or does another thing."""
        norm = self.get_submodule(self.family.last)
        hidden = hidden if hidden.dim() == 2 else packing.pack(hidden)
        if self._last_touched():
            return packing.pack(norm(packing.unpack(hidden)))
        return norm(hidden)

    def _last_touched(self) -> str | None:
        last = self.family.last
        why = last and untouched(self.get_submodule(last), nn.LayerNorm)
        return f"its {last}: {why}" if why else None

    def more(self, hidden: torch.Tensor, packing: Packing, kwargs: dict[str, Any]) -> dict:
        """What the family's `Batch` has besides the packed states."""
        return self.family.more(self, hidden)

    def arguments(
        self, attention_mask: torch.Tensor | None, more: dict[str, Any], kwargs: dict[str, Any]
    ) -> Callable[[int], tuple[tuple, dict]]:
        """What the stock encoder gives a layer after the states, as a function of the layer."""
        args, own = self.family.arguments(self, attention_mask, more)
        return lambda layer: (args, own or kwargs)

    def _by_modules(self, watched, found) -> bool:
        """Whether the layers must be called: somebody looks, or they do more than was found."""
        return (
            watched
            or any([isinstance(layer, Unfit) for layer in found])
            or any([m.training and getattr(m, "gradient_checkpointing", False) for m in self.layer])
        )

    def settings(self) -> "PreTrainedConfig":
        """The model's configuration."""
        return self.family.config(self) if self.packed is None else self.packed.config

    def limit(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[str | None, torch.Tensor | None]:
        """(why this call can't be fused, None), or (None, the mask [batch, seqlen] or None)."""
        if not len(self.layer) and self.packed is None:
            return "it has no layers", None
        for layer in self.layer:
            if not isinstance(layer, FusedLayer):
                return FOREIGN.format(class_name(layer)), None
            if "forward" in vars(layer):
                return "a layer has a forward of its own", None
        if any(a is not None for a in args):
            return "it was given more than states and a mask by position", None
        given = map(kwargs.get, ("encoder_hidden_states", "past_key_values"))
        if any(a is not None for a in given) or kwargs.get("use_cache"):
            return "it was called as a decoder", None
        why = self.family.limit(self)
        for name in ("query_states", "relative_pos"):
            why = why or (f"it was called with {name}" if kwargs.get(name) is not None else None)
        if self.family.even and getattr(attention_mask, "ndim", 2) != 2:
            why = why or f"the attention mask has shape {list(attention_mask.shape)}"
        if why:
            return why, None
        if asked(self.settings(), kwargs, "output_attentions"):
            return "attention maps were asked for", None
        gone = self.packed is not None and not self.family.gives_states
        if gone and asked(self.settings(), kwargs, "output_hidden_states"):
            return "hidden states were asked for, of layers that are gone", None
        why = call_limit(hidden_states)
        if why:
            return why, None
        why, keys = key_mask(attention_mask, hidden_states)
        return why or (keys is not None and self.family.mask_limit(keys)) or None, keys


class FusedGroups(FusedEncoder):
    """Of a family with `Family.order`: `layer` has a layer as often as it runs."""

    @property
    def layer(self) -> list[nn.Module]:
        return [layer for _, layer in self.family.order(self)]

    def sizes(self) -> list[tuple[int, ...]]:
        return [place for place, _ in self.family.order(self)]

    def path(self, name: str, *layer: int) -> str:
        return super().path(name, *[step for i in layer for step in self.sizes()[i]])
