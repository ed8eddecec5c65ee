"""Training: `finetune`, `evaluate` and `predict` for classification and regression."""

from .classify import evaluate, finetune, predict
from .config import ConfigError, FinetuneConfig
from .loop import InterruptedRunError, TrainingError

__all__ = [
    "ConfigError",
    "FinetuneConfig",
    "InterruptedRunError",
    "TrainingError",
    "evaluate",
    "finetune",
    "predict",
]
