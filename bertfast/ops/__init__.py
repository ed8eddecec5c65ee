"""The operators of a BERT encoder, each with interchangeable backends (see `registry`)."""

from . import cuda, registry  # noqa: F401  cuda registers its backend
from .add_layer_norm import add_layer_norm
from .attention import attention
from .cross_attention import cross_attention
from .dropout import draw_seeds
from .embedding_layer_norm import embedding_layer_norm
from .gated_act import gated_act
from .linear_act import feed_forward, linear_act, qkv_linear
from .masked_cross_entropy import masked_cross_entropy
from .pack import pack, unpack
from .registry import backend
from .rotary import rotary

__all__ = [
    "add_layer_norm",
    "attention",
    "backend",
    "cross_attention",
    "draw_seeds",
    "embedding_layer_norm",
    "feed_forward",
    "gated_act",
    "linear_act",
    "masked_cross_entropy",
    "pack",
    "qkv_linear",
    "registry",
    "rotary",
    "unpack",
]
