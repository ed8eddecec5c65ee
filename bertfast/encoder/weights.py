"""What a layer's parameters are called, the one place that knows their order."""

from array import array
from functools import cache
from itertools import chain
from typing import NamedTuple

import torch

from ..ops.extension import C


class Parameters(NamedTuple):
    """Of a linear layer or a layer norm, as torch has them."""

    weight: torch.Tensor  # [out, in] or [size]
    bias: torch.Tensor  # [out] or [size]


class LayerWeights(NamedTuple):
    """By role; csrc/layer.h has the struct of the same name."""

    query: Parameters
    key: Parameters
    value: Parameters
    out: Parameters  # behind the attention
    norm1: Parameters
    up: Parameters
    down: Parameters
    norm2: Parameters

    @classmethod
    def of(cls, parameters):
        """From all of them, in the order of `flat`."""
        return cls(*map(Parameters, *[iter(parameters)] * 2))

    def flat(self) -> list[torch.Tensor]:
        return list(chain.from_iterable(self))


NORMS = ("norm1", "norm2")
MATRICES = tuple(role for role in LayerWeights._fields if role not in NORMS)
FLAT = tuple((role, part) for role in LayerWeights._fields for part in Parameters._fields)
IS_MATRIX = tuple(part == "weight" and role in MATRICES for role, part in FLAT)
assert C is None or (LayerWeights._fields, 8 * len(IS_MATRIX)) == (C.ROLES, C.LAYER_BYTES), C.ROLES


@cache
def shapes(spec) -> list[tuple[int, ...]]:
    """In the order of `LayerWeights.flat`."""
    hidden, inner, width = spec.hidden, spec.inner, spec.width
    weights = dict.fromkeys(("query", "key", "value"), (width, hidden))
    weights |= dict.fromkeys(NORMS, (hidden,)) | {"out": (hidden, width)}
    weights |= {"up": (inner, hidden), "down": (hidden, inner)}
    return list(chain.from_iterable((weights[r], weights[r][:1]) for r in LayerWeights._fields))


def addresses(flat) -> array:
    """What C++ reads as LayerWeights[layers], of all layers' parameters in `flat`'s order."""
    return array("q", map(torch.Tensor.data_ptr, flat))
