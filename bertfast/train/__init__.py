"""Training: `pretrain`; `finetune`, `evaluate` and `predict` for classification, regression."""

from .classify import finetune
from .config import ConfigError, FinetuneConfig, PretrainConfig
from .inference import evaluate, predict, predict_table
from .loop import InterruptedRunError, TrainingError
from .pretrain import pretrain

__all__ = [
    "ConfigError",
    "FinetuneConfig",
    "InterruptedRunError",
    "PretrainConfig",
    "TrainingError",
    "evaluate",
    "finetune",
    "predict",
    "predict_table",
    "pretrain",
]
