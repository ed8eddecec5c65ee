"""The fused classes, one for each encoder and layer class of a family, made when one comes.

Each is also an attribute of this module by its own name, where pickle looks for it.
"""

import functools

from .. import families
from . import readers
from .fused import FusedEncoder, FusedLayer

_made: dict[str, type] = {}


def fused(stock: type) -> type | None:
    """The class in the place of transformers' own, or None for one of no family."""
    family = families.of(stock)
    return None if family is None else _make(stock, family)


@functools.cache
def _make(stock, family):
    if family.readers is not None:
        readers.register(family)
    mixin = FusedLayer if stock.__name__ == family.layer else FusedEncoder
    name = f"{stock.__name__}_of_{stock.__module__.replace('.', '_')}"
    own = {"__module__": __name__, "__qualname__": name, "stock": stock, "family": family}
    _made[name] = type(stock.__name__, (mixin, stock), own)
    return _made[name]


def __getattr__(name):
    for family in families.known():
        for cls in (family.encoder, family.layer):
            if name == f"{cls}_of_{family.module.replace('.', '_')}":
                return fused(family.named(cls))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
