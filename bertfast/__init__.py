"""bertfast: the fastest way to run and train BERT-family encoders."""

from .encoder import executor
from .freeze import freeze
from .ops import backend

__version__ = "0.2.0"

# transformers takes seconds to import, and operators don't need it: these come when asked for.
_MODELS = (
    "BertModel",
    "BertForMaskedLM",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertEncoderDecoder",
    "BertForTokenClassification",
    "cuda_graphs",
)
_DROPIN = ("accelerate", "accelerated", "is_accelerated", "restore")
_SAVED = ("load_frozen", "save_frozen")
__all__ = ["backend", "build_info", "embed", "executor", "freeze", *_DROPIN, *_MODELS, *_SAVED]


def __getattr__(name):
    if name in _MODELS:
        from . import model

        return getattr(model, name)
    if name in _DROPIN:
        from . import dropin

        return getattr(dropin, name)
    if name in _SAVED:
        from . import saved

        return getattr(saved, name)
    if name == "embed":
        from .embedding import embed

        return embed
    raise AttributeError(f"module 'bertfast' has no attribute {name!r}")


def build_info() -> dict:
    """What this installation is made of: versions, the extension and its instruction sets."""
    import platform

    import torch

    from .ops import extension

    info = {"version": __version__, "python": platform.python_version(), "torch": torch.__version__}
    if extension.C is None:
        return info | {"extension": None, "error": extension.error}
    return info | {"extension": extension.C.__spec__.origin} | extension.C.build_info()
