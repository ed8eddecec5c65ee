"""The layers of a model that has no encoder: its own forward goes through them, and finds in their
place steps that run them all at once."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..ops.library import wide
from . import readers
from .fused import FusedEncoder, Last

if TYPE_CHECKING:
    from ..encoder.batch import Packing
    from ..encoder.spec import Layer, Unfit


class FusedStack(FusedEncoder):
    """Mixed into torch's ModuleList, and one for everybody but the forward of the family's model,
    which is given steps to go through: one for each kind of layer, which is told what the model
    tells that kind, of which the last one runs all layers. Where they can't run fused the layers
    follow, as ever."""

    SETTINGS = (*FusedEncoder.SETTINGS, "bertfast_kinds")
    LAYERS = ""
    bertfast_kinds = ()  # of the layers, while they are there

    @property
    def layer(self) -> nn.ModuleList:
        return self

    def __iter__(self) -> Iterator[Any]:
        return self._steps() if self._asked() else super().__iter__()

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return super().__getitem__(index)
        whole = range(len(self))[index] == range(len(self))
        return self._steps() if whole and self._asked() else nn.ModuleList([*self][index])

    def _asked(self) -> bool:
        """Whether the family's model goes through them, and with masks of its own."""
        if torch.compiler.is_compiling():
            return False
        frame = sys._getframe(2)
        if not readers.runs(frame, self.family.named(self.family.encoder)):
            return False
        return not isinstance(readers.variables(frame)["attention_mask"], dict)

    def _steps(self):
        self.read_kinds()
        told, step = {}, None
        for kind in self.bertfast_kinds:
            step = Step(self, kind, told)
            yield step
        if step is None:
            self.bertfast_last = Last("it has no layers")
        if step is None or not step.done:
            yield from super().__iter__()

    def read_kinds(self) -> None:
        if self.packed is None:  # or they are gone
            self.bertfast_kinds = tuple(dict.fromkeys(map(self.family.kind, super().__iter__())))

    def empty(self) -> None:
        self.read_kinds()
        super().empty()

    def read(self) -> "list[Layer | Unfit]":
        self.read_kinds()
        return super().read()

    def run(self, hidden_states: torch.Tensor, told: Any) -> Any:
        """The states behind the last layer, or None where the layers must run themselves.

        told: each kind's (attention mask, keywords); the first kind's mask is of keys alone.
        """
        mask, kwargs = told.get(self.family.kinds[0], (None, {}))
        # A cache is used where there is one; EuroBERT's default asks for it and makes none.
        out = self.fused(hidden_states, mask, (), {**kwargs, "told": told, "use_cache": False})
        return out and out[0]

    def limit(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[str | None, torch.Tensor | None]:
        why, keys = super().limit(hidden_states, attention_mask, args, kwargs)
        told = kwargs["told"]
        if self.family.kinds[0] not in told:
            why = f"no layer's kind is {self.family.kinds[0]!r}"
        batch, seqlen = hidden_states.shape[:2]
        for _, own in told.values():
            angles = own.get("position_embeddings")
            fit = isinstance(angles, tuple) and len(angles) == 2
            if not fit or any(t.dim() != 3 or t.shape[1] != seqlen for t in angles):
                why = why or "rotary positions are no cosines and sines of every token"
            elif not {t.shape[0] for t in angles} <= {1, batch}:
                why = why or "rotary positions are of another batch"
        return why, keys

    def more(self, hidden_states: torch.Tensor, packing: "Packing", kwargs: dict[str, Any]) -> dict:
        told, first = kwargs["told"], self.family.kinds[0]
        tables = [
            table(*told.get(kind, told[first])[1]["position_embeddings"], hidden_states, packing)
            for kind in self.family.kinds
        ]
        return {"angles": tuple(tables)}

    def arguments(
        self, attention_mask: torch.Tensor | None, more: dict[str, Any], kwargs: dict[str, Any]
    ) -> Any:
        def told(layer):
            mask, own = kwargs["told"][self.family.kind(layer)]
            return (mask,), own

        return told


def table(
    cos: torch.Tensor, sin: torch.Tensor, hidden_states: torch.Tensor, packing: "Packing"
) -> torch.Tensor:
    """One of `Batch.angles`, of cosines and sines [batch or 1, seqlen, head_dim], halves equal."""
    half, dtype = cos.shape[-1] // 2, wide(hidden_states.dtype)
    angles = torch.stack([cos[..., :half], sin[..., :half]], -2).to(dtype)
    if len(angles) == 1:
        return angles[0].index_select(0, packing.columns())
    return packing.pack(angles).contiguous()


class Step:
    """In the place of the layers of a kind."""

    done = False

    def __init__(self, stack: FusedStack, kind: Any, told: Any) -> None:
        self.stack, self.attention_type, self.told = stack, kind, told

    def __call__(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        self.told[self.attention_type] = attention_mask, kwargs
        if len(self.told) < len(self.stack.bertfast_kinds):
            return hidden_states
        out = self.stack.run(hidden_states, self.told)
        self.done = out is not None
        return out if self.done else hidden_states
