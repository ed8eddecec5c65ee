"""bertfast: the fastest way to run and train BERT-family encoders."""

import importlib
from typing import TYPE_CHECKING

from .encoder import executor
from .freeze import freeze
from .ops import backend

__version__ = "0.2.0"

__all__ = [
    "BertEncoderDecoder",
    "BertForMaskedLM",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "accelerate",
    "accelerated",
    "backend",
    "build_info",
    "cuda_graphs",
    "embed",
    "executor",
    "freeze",
    "is_accelerated",
    "load_frozen",
    "restore",
    "save_frozen",
]

# transformers takes seconds to import, and operators don't need it: these come when asked for.
_LAZY = {
    "dropin": ("accelerate", "accelerated", "is_accelerated", "restore"),
    "embedding": ("embed",),
    "model": (
        *("BertModel", "BertForMaskedLM", "BertForPreTraining", "BertForQuestionAnswering"),
        *("BertForSequenceClassification", "BertForTokenClassification", "BertEncoderDecoder"),
        "cuda_graphs",
    ),
    "saved": ("load_frozen", "save_frozen"),
}
_MODULE_OF = {name: module for module, names in _LAZY.items() for name in names}

if TYPE_CHECKING:  # the same; tests/test_types.py holds them alike
    from .dropin.accelerate import accelerate, accelerated, is_accelerated, restore
    from .embedding import embed
    from .model import (
        BertEncoderDecoder,
        BertForMaskedLM,
        BertForPreTraining,
        BertForQuestionAnswering,
        BertForSequenceClassification,
        BertForTokenClassification,
        BertModel,
        cuda_graphs,
    )
    from .saved import load_frozen, save_frozen
else:  # a checker would take any name at all for one that this serves

    def __getattr__(name):
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'bertfast' has no attribute {name!r}")
        module = importlib.import_module(f".{_MODULE_OF[name]}", __name__)
        return getattr(module, name)


def build_info() -> dict:
    """What this installation is made of: versions, the extension and its instruction sets."""
    import platform

    import torch

    from .ops import extension

    info = {"version": __version__, "python": platform.python_version(), "torch": torch.__version__}
    if extension.C is None:
        return info | {"extension": None, "error": extension.error}
    return info | {"extension": extension.C.__spec__.origin} | extension.C.build_info()
