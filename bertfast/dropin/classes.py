"""The fused classes, one for each encoder and layer class of a family, made when one comes.

Each is also an attribute of this module by its own name, where pickle looks for it.
"""

import functools

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
    own = {"__module__": __name__, "__qualname__": _name(family, stock.__name__)}
    return type(stock.__name__, (mixin, stock), own | {"stock": stock, "family": family})


def _name(family, cls: str) -> str:
    return f"{cls}_of_{family.module.replace('.', '_')}"


def __getattr__(name):
    for family in families.known():
        for cls in (family.encoder, family.layer):
            if name == _name(family, cls):
                return fused(family.named(cls))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
