"""A model family as data: where the roles of a layer's parameters are in its tree of modules."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from ..encoder import DropoutRates, Layer, LayerSpec, LayerWeights, Parameters, Unfit, watch
from ..encoder.adapters import split
from ..encoder.weights import NORMS

# transformers' names for what the kernels compute
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


@cache
def _theirs(cls: type) -> str | None:
    if cls.__module__ != "transformers.activations":
        return None
    from transformers.activations import ACT2FN  # brings torch's compiler: 200 MB, seconds

    return {type(ACT2FN[name]): kernel for name, kernel in ACTIVATIONS.items()}.get(cls)


def kernel_of(activation: nn.Module) -> str | None:
    """What `ops.linear_act` calls a module's function; None where it has none for it."""
    cls = type(activation)
    if cls is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(activation.approximate)
    return "relu" if cls is nn.ReLU else _theirs(cls)


def rate(dropout: nn.Module | None, user: nn.Module | None = None) -> float:
    """The probability that the module drops with now; `user` is the module that decides, where
    its code reads the probability instead of calling the module."""
    if dropout is None:
        return 0.0
    return getattr(dropout, "p", 0.0) if (user or dropout).training else 0.0  # nn.Identity's


class Readers(NamedTuple):
    """Who reads which rows of what a family's encoder returns: class names beside the encoder's."""

    base: str  # its model, which hands on the states, and what a pooler makes of column 0
    # heads that give away column 0 alone -> the module that takes it from the states, by path and
    # class; None where their own forward does
    first: Mapping[str, tuple[str, str] | None]
    tokens: tuple[str, ...]  # heads that give away a row for each token


@dataclass(frozen=True, eq=False)
class Family:
    """Paths are from a layer; classes are names in `module`."""

    module: str
    encoder: str  # its layers are its `layer`
    layer: str
    roles: Mapping[str, str]  # of `LayerWeights` -> path
    bypassed: Mapping[str, str]  # path of the other modules that a kernel stands for -> class
    activation: str  # path of the module
    attention: str  # path of the one that has attention_head_size
    dropouts: tuple[str, str | None, str]  # paths of the modules of `DropoutRates`
    reads_dropout: bool = True  # whether `attention` reads its dropout's rate or calls it
    dropout: type = nn.Dropout
    in_tuple: bool = False  # whether a layer returns (hidden states,)
    # what its encoder returns, of the hidden states, all of them where asked for, and its keywords
    output: Callable = lambda hidden, states, kwargs: BaseModelOutputWithPastAndCrossAttentions(
        last_hidden_state=hidden
    )
    gives_states: bool = False  # whether that has them, or hooks on its layers collect them
    config: Callable = lambda encoder: encoder.config
    # (encoder, hidden states) -> what it gives its layers after the mask and they add to scores
    bias: Callable | None = None
    # why a mask [batch, seqlen] can't run packed, or with its padded rows; or None
    mask_limit: Callable = lambda keys: None
    padding_limit: Callable = lambda keys: None
    readers: Readers | None = None

    def named(self, name: str) -> type:
        return getattr(importlib.import_module(self.module), name)

    @cached_property
    def _plan(self):
        return _Plan(self)

    def read(self, layer: nn.Module) -> Layer | Unfit:
        """What kernels take to do all that calling the modules inside would; or why that may be
        something else. Asked at every forward: a model can change between two."""
        plan, found = self._plan, [layer]
        try:
            for parent, name in plan.steps:
                found.append(found[parent]._modules[name])
            attention = found[plan.attention]
            head_dim = attention.attention_head_size
        except (AttributeError, KeyError) as e:
            return Unfit("", f"it is not built as its class is: {e!r}")
        own = layer.__dict__
        if own.get("is_decoder") or own.get("add_cross_attention"):
            return Unfit("", "it is a decoder layer")
        config = vars(attention).get("config")
        positions = getattr(config, "position_embedding_type", None)
        if positions not in (None, "absolute"):  # transformers 5 itself has forgotten them
            return Unfit(self.attention, f"its positions are {positions!r}, not 'absolute'")
        kernel = kernel_of(found[plan.activation])
        if kernel is None:
            return Unfit(self.activation, f"no kernel has {found[plan.activation]!r}")
        modules = tuple([found[i] for i in plan.checked])
        modules, adapted = split(modules, plan.names)
        if isinstance(modules, Unfit):
            return modules
        why = watch.limit(modules, (*plan.types, type(found[plan.activation])), plan.names)
        if why:
            return why
        count = len(self.roles)
        weighted, bypassed = modules[:count], modules[count:]
        if any(
            [
                "chunk_size_feed_forward" in d and d["chunk_size_feed_forward"]
                for d in (own, *map(vars, bypassed))
            ]
        ):
            return Unfit("", "chunk_size_feed_forward is set")
        own = [Parameters(m._parameters["weight"], m._parameters["bias"]) for m in weighted]
        weights = LayerWeights(**dict(zip(self.roles, own, strict=True)))
        if modules[plan.norm1].eps != modules[plan.norm2].eps:
            return Unfit("", "its LayerNorms differ in eps")
        first, second, third = plan.dropouts
        rates = DropoutRates(
            rate(found[first], attention if self.reads_dropout else None),
            0.0 if second is None else rate(found[second]),
            rate(found[third]),
        )
        hidden, inner = weights.norm1.bias.shape[0], weights.up.bias.shape[0]
        heads = weights.query.bias.shape[0] // head_dim
        spec = LayerSpec(hidden, heads, head_dim, inner, kernel, modules[plan.norm1].eps)
        roles = [*self.roles]
        adapted = {roles[i]: m for i, m in adapted.items()}
        return Layer(spec, weights, rates, adapted)


class _Plan:
    """A family's paths as steps from module to module, each walked once."""

    def __init__(self, family: Family):
        self.steps, places = [], {"": 0}

        def place(path):
            if path not in places:
                parent, _, name = path.rpartition(".")
                self.steps.append((place(parent), name))
                places[path] = len(self.steps)
            return places[path]

        called = [p for p in family.dropouts[family.reads_dropout :] if p is not None]
        classes = {
            family.roles[role]: nn.LayerNorm if role in NORMS else nn.Linear
            for role in family.roles
        }
        classes |= {path: family.named(name) for path, name in family.bypassed.items()}
        classes |= dict.fromkeys(called, family.dropout)
        self.types, self.names = tuple(classes.values()), (*classes, family.activation)
        self.checked = [place(path) for path in self.names]
        self.activation, self.attention = self.checked[-1], place(family.attention)
        self.dropouts = [None if path is None else place(path) for path in family.dropouts]
        self.norm1, self.norm2 = map([*family.roles].index, NORMS)
