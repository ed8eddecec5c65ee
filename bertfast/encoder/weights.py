"""What a layer's parameters are called, the one place that knows their order."""

from array import array
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..ops.extension import C

if TYPE_CHECKING:
    from .spec import LayerSpec


class Parameters(NamedTuple):
    """Of a linear layer or a norm, as torch has them; None for what there isn't."""

    weight: torch.Tensor | None  # [out, in] or [size]
    bias: torch.Tensor | None  # [out] or [size]


NONE = Parameters(None, None)


class LayerWeights(NamedTuple):
    """By role; csrc/layer.h has the struct of the same name."""

    query: Parameters = NONE
    key: Parameters = NONE
    value: Parameters = NONE
    out: Parameters = NONE  # behind the attention
    norm1: Parameters = NONE
    up: Parameters = NONE
    down: Parameters = NONE
    norm2: Parameters = NONE
    gate: Parameters = NONE
    pos_key: Parameters = NONE  # of relative positions, which queries meet; or the key does
    pos_query: Parameters = NONE  # and keys; or the query

    @classmethod
    def of(cls, parameters: Iterable[torch.Tensor | None]) -> "LayerWeights":
        """From all of them, in the order of `flat`."""
        return cls(*map(Parameters, *[iter(parameters)] * 2))

    def flat(self) -> list[torch.Tensor | None]:
        return list(chain.from_iterable(self))

    def filled(self, tensors: Iterator[torch.Tensor | None]) -> "LayerWeights":
        """With the next of the tensors, an iterator, for each parameter that is there."""
        return self.of([None if p is None else next(tensors) for p in self.flat()])

    def present(self) -> list[torch.Tensor]:
        return [p for p in self.flat() if p is not None]


NORMS = ("norm1", "norm2")
MATRICES = tuple(role for role in LayerWeights._fields if role not in NORMS)
FLAT = tuple((role, part) for role in LayerWeights._fields for part in Parameters._fields)
IS_MATRIX = tuple(part == "weight" and role in MATRICES for role, part in FLAT)
assert C is None or (LayerWeights._fields, 8 * len(IS_MATRIX)) == (C.ROLES, C.LAYER_BYTES), C.ROLES


BERT = 16  # of `flat`, the first: the parameters of a layer as BERT's


@cache
def shapes(spec: "LayerSpec") -> list[tuple[int, ...]]:
    """In the order of `LayerWeights.flat`, of all that a layer may have."""
    hidden, inner, width = spec.hidden, spec.inner, spec.width
    weights = dict.fromkeys(("key", "value"), (width // spec.groups, hidden))
    weights |= dict.fromkeys(("query", "pos_key", "pos_query"), (width, hidden))
    weights |= dict.fromkeys(NORMS, (hidden,)) | {"out": (hidden, width)}
    weights |= dict.fromkeys(("up", "gate"), (inner, hidden)) | {"down": (hidden, inner)}
    return list(chain.from_iterable((weights[r], weights[r][:1]) for r in LayerWeights._fields))


def fit(spec: "LayerSpec", weights: LayerWeights) -> bool:
    """Whether the shapes of what is there are a layer's."""
    both = zip(weights.flat(), shapes(spec), strict=True)
    return all([p is None or p.shape == shape for p, shape in both])


@cache
def needed(spec: "LayerSpec") -> list[int]:
    """Of `LayerWeights.flat`: the weights that a layer can't do without."""
    absent = {"pos_key", "pos_query"}  # which may be shared
    absent |= set() if spec.gated else {"gate"}
    absent |= {"norm1"} if spec.pre_norm else set()
    return [i for i, (role, part) in enumerate(FLAT) if part == "weight" and role not in absent]


def addresses(layers: list[LayerWeights]) -> array:
    """What C++ reads as LayerWeights[layers]."""
    flat = [p for weights in layers for p in weights.flat()]
    return array("q", [0 if p is None else p.data_ptr() for p in flat])
