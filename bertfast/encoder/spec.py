"""What a layer of an encoder is: post-norm (Devlin et al., arXiv:1810.04805) or pre-norm (Xiong et
al., arXiv:2002.04745)."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import starmap
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import torch

from ..ops.attention import default_scale
from .weights import LayerWeights, Parameters

Seeds: TypeAlias = torch.Tensor | Sequence[torch.Tensor | None]  # None of what drops nothing


class LayerSpec(NamedTuple):
    """All that decides a layer's arithmetic but its weights."""

    hidden: int
    heads: int
    head_dim: int
    inner: int
    activation: str  # of `ops.linear_act`, or of `ops.gated_act` where there is a gate
    eps: float
    pre_norm: bool = False  # norm1 before the attention, norm2 before the feed-forward
    rms: bool = False  # norms of root mean squares, without a mean (arXiv:1910.07467)
    gated: bool = False  # activation(up) * gate (arXiv:2002.05202)
    groups: int = 1  # heads of queries to one of keys and values (arXiv:2305.13245)
    rotary: int | None = None  # which of the batch's `angles` turn queries and keys
    window: int | None = None  # how far from itself a token sees, to either side
    relative: tuple[str, ...] = ()  # "c2p", "p2c": disentangled positions (arXiv:2006.03654)

    @property
    def width(self) -> int:
        """Of the attention, all heads side by side: `hidden`, but where heads were pruned."""
        return self.heads * self.head_dim

    @property
    def scale(self) -> float:
        """Of the scores, of which each kind of relative position adds one; then it is rounded as
        transformers rounds it, that results in fp64 are its, too."""
        if not self.relative:
            return default_scale(self.head_dim)
        return _rounded_scale(self.head_dim * (1 + len(self.relative)))

    def alike(self, other: "LayerSpec") -> bool:
        """Whether layers differ in windows and rotary positions at most."""
        return self == other._replace(window=self.window, rotary=self.rotary)

    @property
    def like_bert(self) -> bool:
        """Whether it is all as in BERT but for its sizes and activation."""
        return self[6:] == _BERT


@cache
def _rounded_scale(n: int) -> float:
    return 1 / torch.tensor(float(n)).sqrt().item()


_BERT = tuple(LayerSpec._field_defaults.values())


class DropoutRates(NamedTuple):
    attention: float = 0.0  # of its probabilities
    projection: float = 0.0  # of the attention's output
    output: float = 0.0  # of the feed-forward's
    inner: float = 0.0  # behind the activation
    relative: float = 0.0  # of the embeddings of relative positions


DROPOUTS = len(DropoutRates._fields)


def of_layer(seeds: Seeds, first: int, last: int | None = None) -> Seeds:
    """Those of a layer, or of layers [first, last), among all layers'."""
    return seeds[DROPOUTS * first : DROPOUTS * (first + 1 if last is None else last)]


class Layer(NamedTuple):
    """A layer that kernels can run now."""

    spec: LayerSpec
    weights: LayerWeights
    dropout: DropoutRates = DropoutRates()
    # a matrix's role -> what is called in its product's place, bias included: [n, in] -> [n, out]
    adapters: Mapping[str, Callable] = MappingProxyType({})
    # roles whose matrices lie on each other in one, which the first of them has
    stacked: tuple[tuple[str, ...], ...] = ()

    def role_of(self, positions: str) -> str:
        """Whose matrix projects relative positions: their own, or the key's or query's they share.

        positions: one of `LayerSpec.relative`.
        """
        own, shared = {"c2p": ("pos_key", "key"), "p2c": ("pos_query", "query")}[positions]
        return shared if getattr(self.weights, own).weight is None else own

    def apart(self) -> LayerWeights:
        """The weights, each role's own: views for now."""
        weights = self.weights
        for roles in self.stacked:
            whole = getattr(weights, roles[0])
            parts = [p if p is None else p.chunk(len(roles)) for p in whole]
            own = [[p and p[i] for p in parts] for i in range(len(roles))]
            weights = weights._replace(**dict(zip(roles, starmap(Parameters, own), strict=True)))
        return weights


class Layers(list["Layer | Unfit"]):
    """Of an encoder, for as long as its modules stay as they are."""

    kept: Any = None  # of `executors.whole_cpu`, between calls; a copy has none

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ([*self],)


class Unfit(NamedTuple):
    """Why kernels can't run a layer now."""

    where: str  # the path of a module in it, "" for the layer itself
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.why}" if self.where else self.why
