"""What a layer of an encoder is: post-norm (Devlin et al., arXiv:1810.04805)."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from .weights import LayerWeights


class LayerSpec(NamedTuple):
    """All that decides a layer's arithmetic but its weights."""

    hidden: int
    heads: int
    head_dim: int
    inner: int
    activation: str  # of `ops.linear_act`
    eps: float

    @property
    def width(self) -> int:
        """Of the attention, all heads side by side: `hidden`, but where heads were pruned."""
        return self.heads * self.head_dim


class DropoutRates(NamedTuple):
    attention: float = 0.0  # of its probabilities
    projection: float = 0.0  # of the attention's output
    output: float = 0.0  # of the feed-forward's


class Layer(NamedTuple):
    """A layer that kernels can run now."""

    spec: LayerSpec
    weights: LayerWeights
    dropout: DropoutRates = DropoutRates()
    # a matrix's role -> what is called in its product's place, bias included: [n, in] -> [n, out]
    adapters: Mapping[str, Callable] = MappingProxyType({})


class Unfit(NamedTuple):
    """Why kernels can't run a layer now."""

    where: str  # the path of a module in it, "" for the layer itself
    why: str

    def __str__(self):
        return f"{self.where}: {self.why}" if self.where else self.why
