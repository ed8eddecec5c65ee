"""The fused classes, one for each encoder and layer class of a family, made when one comes."""

import copy
import functools
from multiprocessing.reduction import ForkingPickler

from .. import families
from . import readers
from .fused import FusedEncoder, FusedLayer


def fused(stock: type) -> type | None:
    """The class in the place of transformers' own, or None for one of no family."""
    family = families.of(stock)
    return None if family is None else _make(stock, family)


@functools.cache
def _make(stock, family):
    if family.readers is not None:
        readers.register(family)
    mixin = FusedLayer if stock.__name__ == family.layer else FusedEncoder
    own = {"__module__": __name__, "stock": stock, "family": family}
    made = type(stock.__name__, (Swapped, mixin, stock), own)
    ForkingPickler.register(made, lambda m: (_arrived, (stock,), m.__getstate__()))
    return made


def _arrived(stock: type):
    cls = fused(stock) or stock
    return cls.__new__(cls)


class Swapped:
    """In a file (pickle, torch.save) it is the stock module, which loads where bertfast isn't; a
    copy is accelerated, and so is what `multiprocessing` sends to another process."""

    def __reduce_ex__(self, protocol):
        made, (cls, *rest), state = object.__reduce_ex__(self, 0)  # 2's takes no other class
        if "stock" in vars(cls):  # else another class has been laid over it since
            cls = cls.stock
            state = {k: v for k, v in state.items() if k not in FusedEncoder.SETTINGS}
        return made, (cls, *rest), state

    def __copy__(self):
        new = type(self).__new__(type(self))
        new.__setstate__(self.__getstate__())
        return new

    def __deepcopy__(self, memo):
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new
