"""Could anyone tell? When kernels may take modules' place: what would make calling them another
result. Native models and the drop-in ask here, at every forward: a model can change between two.
"""

import functools
from collections.abc import Callable, Sequence
from itertools import chain, repeat
from operator import attrgetter, contains
from typing import Any, TypeVar

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook as global_hooks

from ..ops import registry
from ..ops.library import PLAIN, unwatched
from ..ops.library import plain as plain_tensor
from .spec import Unfit

F = TypeVar("F", bound=Callable[..., Any])
R = TypeVar("R")
_hooks = attrgetter(
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
)
_parameters, _is_meta = attrgetter("_parameters"), attrgetter("is_meta")
# What transformers uses to collect hidden states. Its hooks stay after the first call that asked
# for them and do nothing without such a request; with one, the encoder gives padded tensors.
_COLLECTOR = "transformers.utils.output_capturing"
_FSDP = "torch.distributed.fsdp."  # whose hooks gather a layer's weights and look at no result
_PARAMETERS = {nn.Linear: ("weight", "bias"), nn.LayerNorm: ("weight", "bias")}
_PARAMETERS[nn.Embedding] = ("weight",)
_OPERATORS = ("attention", "qkv_linear", "linear_act", "add_layer_norm", "gather_rows")


def hooked(m: nn.Module, but: str | tuple[str, ...] = _COLLECTOR) -> bool:
    """Whether anyone has a hook on this module, but hooks from such files."""
    found = m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks
    return any(found) and any(
        not (getattr(hook, "__module__", None) or "").startswith(but)
        for hooks in found
        for hook in hooks.values()
    )


def looked_into(m: nn.Module) -> bool:
    """Whether anyone would see what goes through this module or one inside."""
    found = [m]
    for one in found:
        found += [child for child in one._modules.values() if child is not None]
    if not torch.compiler.is_compiling() and not any(chain.from_iterable(map(_hooks, found))):
        return False
    return any(hooked(one, (_COLLECTOR, _FSDP)) for one in found)


def class_name(m: object) -> str:
    return f"{type(m).__module__}.{type(m).__qualname__}"


def untouched(m: nn.Module, expected: type) -> str | None:
    """Why calling m would not run `expected`'s forward and nothing else, or None."""
    if type(m) is not expected:
        return f"it is a {class_name(m)}, not a plain {expected.__name__}"
    if hooked(m) or "forward" in m.__dict__:
        return "it has a hook or a forward of its own"
    return None


def has_parameters(cls: type, *names: str) -> None:
    """Makes a class's parameters known to `plain`."""
    _PARAMETERS[cls] = names


def plain(m: nn.Module, expected: type, biased: bool = True) -> str | None:
    """Why m is not untouched with all its parameters where a kernel can read them, or None."""
    why = untouched(m, expected)
    if why:
        return why
    for name in _PARAMETERS.get(expected, ()):
        p = m._parameters.get(name)
        if p is None and name == "bias" and not biased:
            continue
        # A Parameter over a tensor subclass (DTensor, torchao's) has that subclass as its type.
        if type(p) not in PLAIN:
            return f"its {name} is {'missing' if p is None else f'a {type(p).__name__}'}"
        if p.is_meta:
            return f"its {name} is on the meta device"
    return None


@functools.cache
def _count(types) -> int:
    return sum(len(_PARAMETERS.get(t, ())) for t in types)


def limit(
    modules: tuple[nn.Module, ...],
    types: tuple[type, ...],
    names: Sequence[str] | None = None,
    biased: bool = True,
) -> Unfit | None:
    """Why not each of the modules is `plain`, of its type; None where all are, which is found out
    by functions in C alone. biased: whether no bias may be missing."""
    if (
        biased
        and not torch.compiler.is_compiling()
        and tuple(map(type, modules)) == types
        and not any(chain.from_iterable(map(_hooks, modules)))
        and not any(map(contains, map(vars, modules), repeat("forward")))
    ):
        found = [*chain.from_iterable(map(dict.values, map(_parameters, modules)))]
        whole = len(found) == _count(types)
        if whole and {*map(type, found)} <= PLAIN and not any(map(_is_meta, found)):
            return None
    for m, expected, name in zip(modules, types, names or repeat(None), strict=names is not None):
        why = plain(m, expected, biased)
        if why:
            return Unfit(name or expected.__name__, why)
    return None


class Seen:
    """What was last read off modules, for as long as they are as they were. A copy or a pickle has
    seen nothing."""

    def __init__(self) -> None:
        self._last = None

    def get(self, root: nn.Module, also: object, read: Callable[[], R]) -> R:
        """`read()`, which looks at nothing but the modules in `root` and what is in `also`."""
        last = self._last
        if last is None or last.root is not root or last.also != also or not last.holds():
            last = self._last = Snapshot(root, also, read())
        return last.found

    def __deepcopy__(self, memo: dict[int, Any]) -> "Seen":
        return type(self)()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class Snapshot:
    """Modules, of which another class, attribute, child, parameter or hook is a change."""

    def __init__(self, root: nn.Module, also: object = None, found: Any = None) -> None:
        self.root, self.also, self.found = root, also, found
        self.modules = list(root.modules())
        self.types, self.vars = [*map(type, self.modules)], [*map(vars, self.modules)]
        # Lists are changed in place, as peft's of what it has merged.
        self.then = [
            {name: v.copy() if type(v) is list else v for name, v in own.items()}
            for own in self.vars
        ]
        self.hooks = [*chain.from_iterable(map(_hooks, self.modules))]
        self.hooked = [*map(dict, self.hooks)] if any(self.hooks) else None
        self.children = [m._modules for m in self.modules if m._modules]
        self.inside = [*map(dict, self.children)]
        self.named = [m._parameters for m in self.modules if m._parameters]
        self.parameters = self.ids()

    def ids(self) -> list[int]:  # == of tensors would compare their values
        return [*map(id, chain.from_iterable(map(dict.values, self.named)))]

    def holds(self) -> bool:
        try:
            return (
                (not any(self.hooks) if self.hooked is None else self.hooks == self.hooked)
                and self.vars == self.then
                and self.children == self.inside
                and [*map(type, self.modules)] == self.types
                and self.ids() == self.parameters
            )
        except (RuntimeError, TypeError, ValueError):  # an array, say, which is equal in part
            return False


def outside_graphs(method: F) -> F:
    """A method that runs as ever while torch compiles its callers, which would take it apart: the
    graph breaks around it, where it may."""

    @functools.wraps(method)
    def call(*args, **kwargs):
        if torch.compiler.is_dynamo_compiling():
            from .compile import outside, unbroken

            if not unbroken():
                return outside(method, *args, **kwargs)
        return method(*args, **kwargs)

    return call


def dispatch_limit(hidden: torch.Tensor) -> str | None:
    """What keeps kernels from running without torch's dispatcher."""
    if not unwatched():
        return "a dispatch mode, a transform, tracing or compilation watches the operators"
    if not plain_tensor(hidden):
        return f"the hidden states are a {type(hidden).__name__} of no plain memory"
    return None


def call_limit(hidden_states: torch.Tensor) -> str | None:
    """What in torch's state or in the input keeps an encoder's kernels from running."""
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return "the model is being exported"
    if torch.compiler.is_compiling():
        return "torch.compile takes the stock layers into a graph that may not break"
    if global_hooks():
        return "there are global module hooks"
    if type(hidden_states) not in PLAIN:
        return f"the hidden states are a {type(hidden_states).__name__}"
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "a torch.func transform or forward-mode differentiation is active"
    return kernel_limit(hidden_states.device.type, hidden_states.dtype)


def kernel_limit(device: str, dtype: torch.dtype) -> str | None:
    """Why no kernel takes states of a dtype, or what autocast makes of it, on a type of device."""
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if registry.forced() is None and not all(registry.fast(o, device, dtype) for o in _OPERATORS):
        return f"no kernel serves {dtype} on {device}"
    return None
