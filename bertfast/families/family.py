"""A model family as data: where the roles of a layer's parameters are in its tree of modules."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from math import isclose
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
)

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
    "silu": "silu",
    "swish": "silu",
}


Roles = str | tuple[str, ...]


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
    return {nn.ReLU: "relu", nn.SiLU: "silu"}.get(cls) or _theirs(cls)


def rate(dropout: nn.Module | None, user: nn.Module | None = None) -> float:
    """The probability that the module drops with now; `user` is the module that decides, where
    its code reads the probability instead of calling the module."""
    if dropout is None:
        return 0.0
    return getattr(dropout, "p", 0.0) if (user or dropout).training else 0.0  # nn.Identity's


def no_holes(keys: torch.Tensor) -> str | None:
    """`Family.mask_limit` where distances count: a kernel's are those among real tokens."""
    real = keys != 0
    starts = real[:, 0].long() + (real[:, 1:] & ~real[:, :-1]).sum(1)
    return "the attention mask has holes" if bool((starts > 1).any()) else None


def padding_last(keys: torch.Tensor) -> str | None:
    """And `Family.padding_limit`: padded rows come last, at the positions that they have."""
    if bool((keys[:, 1:] != 0).logical_and(keys[:, :-1] == 0).any()):
        return "padded rows are read and are not on the right"
    return None


def states_output(default: bool) -> Callable[..., Any]:
    """A `Family.output` with hidden states, of an encoder that takes `output_hidden_states` and
    `return_dict`, both of one default."""

    def output(hidden, states, kwargs):
        states = tuple(states) if kwargs.get("output_hidden_states", default) else None
        found = BaseModelOutput(last_hidden_state=hidden, hidden_states=states)
        return found if kwargs.get("return_dict", default) else found.to_tuple()

    return output


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
    roles: Mapping[Roles, str]  # of `LayerWeights`, or several stacked in one matrix -> path
    bypassed: Mapping[str, str]  # path of the other modules that a kernel stands for -> class
    activation: str  # path of the module
    attention: str  # path of the one that has attention_head_size
    dropouts: tuple[str | None, ...]  # paths of the modules of `DropoutRates`
    # whether `attention` reads its dropout's rate or calls it; or its attribute that is the rate
    reads_dropout: bool | str = True
    dropout: type = nn.Dropout
    norm: str | None = None  # its norms' class, for torch's
    biased: bool = True  # whether no bias may be missing
    optional: tuple[str, ...] = ()  # paths where an nn.Identity may be
    spec: Callable = lambda layer: {}  # of a layer: what its `LayerSpec` has other than BERT's
    variant: Callable | None = None  # of a layer: the table that it has in place of this one
    # Where the encoder is no module: the path of its layers in the model of class `encoder`, whose
    # forward goes through them; a layer's kind, by which that forward tells it what to look at, and
    # all kinds, in the order of a batch's angles.
    layers: str | None = None
    kind: Callable = lambda layer: None
    kinds: tuple[str | None, ...] = (None,)
    tail: tuple | None = None  # what a layer returns behind the states; None: no tuple, just these
    # Where its layers run in another order than they are in it: the path of their groups, and
    # [(steps from there, layer)] as they run in an encoder.
    groups: str | None = None
    order: Callable | None = None
    entry: Callable = lambda encoder, hidden: hidden  # what it does before its layers
    last: str | None = None  # path of the LayerNorm behind them
    # what its encoder returns, of the hidden states, all of them where asked for, and its keywords
    output: Callable = lambda hidden, states, kwargs: BaseModelOutputWithPastAndCrossAttentions(
        last_hidden_state=hidden
    )
    gives_states: bool = False  # whether that has them, or hooks on its layers collect them
    # of the variables of its model's forward: whether that, which asks for all states, reads them
    reads_states: Callable | None = None
    config: Callable = lambda encoder: encoder.config
    # (encoder, hidden states) -> what its `Batch` has, and what it gives its layers after a mask
    more: Callable = lambda encoder, hidden_states: {}
    arguments: Callable = lambda encoder, mask, more: ((mask, *more.values()), {})
    limit: Callable = lambda encoder: None  # why nothing can take its layers' place, or None
    # Whether a pair of tokens is masked where either is padding, so that a row of padding sees all
    # places alike.
    even: bool = False
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
        try:
            if self.variant is not None:
                return self.variant(layer).read(layer)
            plan, found = self._plan, [layer]
            for parent, name in plan.steps:
                found.append(found[parent]._modules[name])
            attention = found[plan.attention]
            head_dim = getattr(attention, "attention_head_size", None) or attention.head_dim
        except (AttributeError, KeyError) as e:
            return Unfit("", f"it is not built as its class is: {e!r}")
        why = _decoder(layer, attention) or self._positions(attention)
        if why:
            return why
        kernel = kernel_of(found[plan.activation])
        if kernel is None:
            return Unfit(self.activation, f"no kernel has {found[plan.activation]!r}")
        modules = tuple([found[i] for i in plan.checked])
        modules, adapted = split(modules, plan.names)
        if isinstance(modules, Unfit):
            return modules
        types = (*plan.types, type(found[plan.activation]))
        if plan.optional:
            types = tuple(
                nn.Identity if i in plan.optional and type(m) is nn.Identity else cls
                for i, (m, cls) in enumerate(zip(modules, types, strict=True))
            )
        why = watch.limit(modules, types, plan.names, self.biased)
        if why:
            return why
        count = len(self.roles)
        weighted, bypassed = modules[:count], modules[count:]
        if any(
            [
                "chunk_size_feed_forward" in d and d["chunk_size_feed_forward"]
                for d in (vars(layer), *map(vars, bypassed))
            ]
        ):
            return Unfit("", "chunk_size_feed_forward is set")
        own = [Parameters(*map(m._parameters.get, Parameters._fields)) for m in weighted]
        weights = LayerWeights(**dict(zip(plan.roles, own, strict=True)))
        eps = {_eps(weighted[i]) for i in plan.norms if type(weighted[i]) is not nn.Identity}
        if len(eps) != 1:
            return Unfit("", "its norms differ in eps")
        more = self.spec(layer)
        if isinstance(more, str):
            return Unfit("", more)
        hidden, inner = weights.out.weight.shape[0], weights.up.weight.shape[0] // plan.parts("up")
        heads = weights.query.weight.shape[0] // head_dim // plan.parts("query")
        spec = LayerSpec(hidden, heads, head_dim, inner, kernel, *eps, **more)
        if not isclose(vars(attention).get("scaling", spec.scale), spec.scale):
            return Unfit(
                self.attention, f"its scores' scale is {attention.scaling}, not {spec.scale}"
            )
        adapted = {plan.roles[i]: m for i, m in adapted.items()}
        return Layer(spec, weights, self._rates(plan, found, attention), adapted, plan.stacked)

    def _positions(self, attention) -> Unfit | None:
        positions = getattr(vars(attention).get("config"), "position_embedding_type", None)
        if positions in (None, "absolute"):  # transformers 5 itself has forgotten the others
            return None
        return Unfit(self.attention, f"its positions are {positions!r}, not 'absolute'")

    def _rates(self, plan, found, attention) -> DropoutRates:
        first, *others = plan.dropouts
        if isinstance(self.reads_dropout, str):
            p = vars(attention)[self.reads_dropout] if attention.training else 0.0
        else:
            p = rate(found[first], attention if self.reads_dropout else None)
        return DropoutRates(p, *[0.0 if i is None else rate(found[i]) for i in others])


def _decoder(layer, attention) -> Unfit | None:
    own = layer.__dict__
    if own.get("is_decoder") or own.get("add_cross_attention"):
        return Unfit("", "it is a decoder layer")
    return Unfit("", "its attention is causal") if vars(attention).get("is_causal") else None


def _eps(norm) -> float:
    return vars(norm)["eps" if "eps" in vars(norm) else "variance_epsilon"]


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

        called = [p for p in family.dropouts[family.reads_dropout is not False :] if p is not None]
        norm = nn.LayerNorm if family.norm is None else family.named(family.norm)
        watch.has_parameters(norm, "weight", *["bias"] * (family.norm is None))
        classes = {
            path: norm if role in NORMS else nn.Linear for role, path in family.roles.items()
        }
        classes |= {path: family.named(name) for path, name in family.bypassed.items()}
        classes |= dict.fromkeys(called, family.dropout)
        self.types, self.names = tuple(classes.values()), (*classes, family.activation)
        self.checked = [place(path) for path in self.names]
        self.activation, self.attention = self.checked[-1], place(family.attention)
        self.dropouts = [None if path is None else place(path) for path in family.dropouts]
        self.roles = [r if isinstance(r, str) else r[0] for r in family.roles]
        self.stacked = tuple(r for r in family.roles if not isinstance(r, str))
        self.norms = [*map(self.roles.index, NORMS)]
        self.optional = {self.names.index(path) for path in family.optional}

    def parts(self, role: str) -> int:
        """How many roles' matrices lie on each other where this one's does."""
        return next((len(r) for r in self.stacked if role in r), 1)
