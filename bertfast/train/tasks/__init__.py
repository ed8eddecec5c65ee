"""What can be learnt: a file each, of its settings, its task, and its model at work.

A task's module has `HELP`, one line; `Task`, a `FinetuneTask`, whose `Config` is the settings of
`finetune`; `evaluate(model, path, **settings) -> metrics`; `predict_table(model, path, **settings)
-> rows`, and `inference_arguments(parser, labelled)`, the command line's names of those settings.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..config import FinetuneConfig

KINDS = ("classify", "pairs", "qa", "tokens", "translate")


def module(kind: str) -> ModuleType:
    return import_module(f".{kind}", __name__)


def of(config: "FinetuneConfig") -> type:
    """The task that settings are of."""
    if getattr(config, "dp_epsilon", None) is not None:
        return import_module("..private.task", __name__).PrivateClassification
    return module(config.kind).Task
