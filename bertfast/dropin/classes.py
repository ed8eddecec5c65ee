"""The fused classes, one for each encoder and layer class of a family, made when one comes."""

import copy
import functools
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any, SupportsIndex

from torch import nn

from .. import families
from . import readers
from .fused import FusedEncoder, FusedGroups, FusedLayer
from .stack import FusedStack


def fused(module: nn.Module) -> Iterator[tuple[nn.Module, type]]:
    """(module, the class in the place of its own), for it or for the layers in it."""
    family, stock = families.of(type(module)), type(module)
    if family is None:
        return
    if stock.__name__ == family.layer or family.layers is None:
        yield module, _make(stock, family)
    else:
        layers = module.get_submodule(family.layers)
        if type(layers) is nn.ModuleList:
            yield layers, _make(nn.ModuleList, family)


@functools.cache
def _make(stock, family):
    if family.readers is not None:
        readers.register(family)
    mixin = FusedEncoder if family.groups is None else FusedGroups
    mixin = mixin if family.layers is None else FusedStack
    mixin = FusedLayer if stock.__name__ == family.layer else mixin
    own = {"__module__": __name__, "stock": stock, "family": family}
    own |= {"LAYERS": family.groups} if mixin is FusedGroups else {}
    made = type(stock.__name__, (Swapped, mixin, stock), own)
    arrived = stock, family.module
    ForkingPickler.register(made, lambda m: (_arrived, arrived, m.__getstate__()))
    return made


def _arrived(stock: type, module: str):
    family = families.of_module(module)
    cls = stock if family is None else _make(stock, family)
    return cls.__new__(cls)


class Swapped:
    """In a file (pickle, torch.save) it is the stock module, which loads where bertfast isn't; a
    copy is accelerated, and so is what `multiprocessing` sends to another process."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        if getattr(self, "packed", None) is not None:  # stock modules couldn't do with it
            raise TypeError("a frozen model can't be pickled: write it by bertfast.save_frozen")
        made, (cls, *rest), state = object.__reduce_ex__(self, 0)  # 2's takes no other class
        if "stock" in vars(cls):  # else another class has been laid over it since
            own = getattr(cls, "SETTINGS", ())
            cls, state = cls.stock, {k: v for k, v in state.items() if k not in own}
        return made, (cls, *rest), state

    def __copy__(self) -> Any:
        new = type(self).__new__(type(self))
        new.__setstate__(self.__getstate__())
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new
