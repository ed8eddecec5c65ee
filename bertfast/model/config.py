"""Configurations: every value checked before anything is made of it.

What stands here for each is what a BERT encoder can be built with; transformers' own checks are of
types alone, and some of its errors are no ValueError.
"""

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig

from ..families import ACTIVATIONS
from ..files import read_json
from .errors import CheckpointError, unreadable

CONFIG = "config.json"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_NAMES = [str(d).removeprefix("torch.") for d in DTYPES]
_LARGEST = 2**30  # of a size: the bytes of a matrix of two stay within int64
_LAYERS, _LABELS = 1000, 1_000_000
_PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


def _whole(low, high=_LARGEST, none=False):
    """(whether a value is good, what is expected)"""
    text = f"a whole number from {low} to {high:,}" + " or null" * none
    return lambda v: (none and v is None) or (type(v) is int and low <= v <= high), text


def _number(high, none=False):
    text = f"a number from 0 to less than {high}" + " or null" * none
    return lambda v: (none and v is None) or (type(v) in (int, float) and 0 <= v < high), text


def _one_of(*known):
    text = " or ".join(map(json.dumps, known))
    return lambda v: any(type(v) is type(k) and v == k for k in known), text


def _numbered(names) -> bool:
    """Whether these are names by their numbers, 0 to n - 1; some checkpoints' are numbers too."""
    if not isinstance(names, Mapping) or not 1 <= len(names) <= _LABELS:
        return False
    try:
        named = all(type(v) is int or _text(v) for v in names.values())
        return named and {int(k) for k in names} == set(range(len(names)))
    except (TypeError, ValueError, OverflowError):
        return False


def _text(value) -> bool:
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:  # a lone surrogate
        return False


_FLAG, _NO = _one_of(True, False, None), _one_of(False, None)
_DTYPE = (lambda v: v is None or v in (*_NAMES, *DTYPES)), f"{', '.join(_NAMES)} or null"
_RULES = {
    "model_type": _one_of("bert"),
    "architectures": (
        lambda v: v is None or (isinstance(v, list) and all(map(_text, v))),
        "a list of names or null",
    ),
    "quantization_config": (
        lambda v: v is None,
        "none: quantised weights are not read; load the model with what quantised it, dequantise "
        "it and save it in float",
    ),
    "vocab_size": _whole(1),
    "hidden_size": _whole(1),
    "num_hidden_layers": _whole(0, _LAYERS),
    "num_attention_heads": _whole(1),
    "intermediate_size": _whole(1),
    "max_position_embeddings": _whole(1),
    "type_vocab_size": _whole(1),
    "pad_token_id": _whole(0, none=True),
    "hidden_act": _one_of(*ACTIVATIONS),
    "hidden_dropout_prob": _number(1),
    "attention_probs_dropout_prob": _number(1),
    "classifier_dropout": _number(1, none=True),
    "initializer_range": _number(100),
    "layer_norm_eps": _number(1),
    "position_embedding_type": _one_of("absolute", None),
    "is_decoder": (_NO[0], "false: is_decoder is not supported, encoders only"),
    "add_cross_attention": (_NO[0], "false: add_cross_attention is not supported, encoders only"),
    "num_labels": _whole(1, _LABELS),
    "id2label": (
        lambda v: v is None or _numbered(v),
        f"a name for each of the numbers 0 to n - 1, {_LABELS:,} at most",
    ),
    "problem_type": _one_of(*_PROBLEMS, None),
    "per_layer_config": (lambda v: v is None, "null: its layers are all alike"),
    "dtype": _DTYPE,
    "torch_dtype": _DTYPE,
}
_FLAGS = "output_attentions", "output_hidden_states", "return_dict", "tie_word_embeddings"
_RULES |= dict.fromkeys(_FLAGS, _FLAG)


def _check_values(values: Mapping) -> None:
    for name, (good, expected) in _RULES.items():
        if name in values and not good(values[name]):
            raise ValueError(f"{name} is {reprlib.repr(values[name])}, expected {expected}")


def check(config: BertConfig) -> None:
    """Raises ValueError for what no BERT encoder can be built with: the name, its value, what was
    expected."""
    _check_values(vars(config))
    hidden, heads = config.hidden_size, config.num_attention_heads
    if hidden % heads:
        raise ValueError(f"hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    pad, words = config.pad_token_id, config.vocab_size
    if pad is not None and pad >= words:
        raise ValueError(f"pad_token_id is {pad}, expected less than vocab_size, {words}")


def read(path: Path, config_class: type[BertConfig] = BertConfig, **overrides: Any) -> BertConfig:
    """The configuration in a JSON file, with `overrides`. Raises CheckpointError."""
    if not path.exists():
        raise CheckpointError(f"{path} is not there: is this a checkpoint's folder?")
    with unreadable():
        values = read_json(path)
    with unreadable(path):
        if not isinstance(values, dict):
            raise ValueError(
                f"it holds {reprlib.repr(values)}, expected names and values in braces"
            )
        _check_values(values | overrides)
        methods = [n for n in values if n.startswith("__") or callable(getattr(config_class, n, 0))]
        if methods:
            raise ValueError(f"{reprlib.repr(methods[0])} is no name of a setting: remove it")
        config, unknown = config_class.from_dict(values, return_unused_kwargs=True, **overrides)
        if unknown:
            raise TypeError(f"{', '.join(unknown)}: no setting of a {config_class.__name__}")
        check(config)
    return config
