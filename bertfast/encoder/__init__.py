"""An encoder as data, and who runs it. Imports the operators alone."""

from .batch import Batch
from .run import EXECUTORS, executor, run
from .spec import DropoutRates, Layer, LayerSpec, Unfit
from .weights import LayerWeights, Parameters

__all__ = [
    "EXECUTORS",
    "Batch",
    "DropoutRates",
    "Layer",
    "LayerSpec",
    "LayerWeights",
    "Parameters",
    "Unfit",
    "executor",
    "run",
]
