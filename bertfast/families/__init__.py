"""Which modules make an encoder's layer, in each model family: a table each."""

from .albert import ALBERT
from .bert import BERT_LIKE
from .deberta import DEBERTA_V2
from .distilbert import DISTILBERT
from .family import ACTIVATIONS, Family, Readers
from .mpnet import MPNET
from .pre_norm import PRE_NORM
from .rotary import ROTARY

_BY_MODULE: dict[str, Family] = {}


def register(family: Family) -> None:
    """Make a family known to `accelerate` and `freeze`."""
    _BY_MODULE[family.module] = family


def forget(family: Family) -> None:
    """Undo `register`."""
    _BY_MODULE.pop(family.module, None)


def known() -> list[Family]:
    return [*_BY_MODULE.values()]


def of_module(name: str) -> Family | None:
    """The family whose classes are in a module."""
    return _BY_MODULE.get(name)


def of(cls: type) -> Family | None:
    """The family that a class is the encoder or the layer of."""
    family = _BY_MODULE.get(cls.__module__)
    return family if family and cls.__name__ in (family.encoder, family.layer) else None


for _family in (*BERT_LIKE, *PRE_NORM, ALBERT, DISTILBERT, MPNET, *ROTARY, DEBERTA_V2):
    register(_family)

__all__ = ["ACTIVATIONS", "Family", "Readers", "forget", "known", "of", "of_module", "register"]
