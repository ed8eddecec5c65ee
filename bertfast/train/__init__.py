"""Training: `pretrain`, and `finetune` for any task; `evaluate` and `predict` for classification
and regression, and for each other task in its module of `tasks`."""

from .config import ConfigError, FinetuneConfig, PretrainConfig
from .finetune import finetune
from .loop import InterruptedRunError, TrainingError
from .pretrain import pretrain
from .tasks.classify import ClassifyConfig
from .tasks.classify_inference import evaluate, predict, predict_table

__all__ = [
    "ClassifyConfig",
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
