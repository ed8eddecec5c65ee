"""Backend "cuda": each operator's arguments as raw pointers for csrc/cuda. Importing registers."""

from . import add_layer_norm, attention, embedding_layer_norm, linear_act, masked_cross_entropy

__all__ = [
    "add_layer_norm",
    "attention",
    "embedding_layer_norm",
    "linear_act",
    "masked_cross_entropy",
]
