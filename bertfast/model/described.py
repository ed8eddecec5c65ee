"""The configuration that a live model has: what was changed since it was made, its modules say."""

import copy
from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..families.family import ACTIVATIONS, kernel_of
from .encoder import BertEmbeddings, BertEncoder, BertIntermediate

if TYPE_CHECKING:
    from transformers import BertConfig

_NAMES = {kernel: name for name, kernel in reversed(ACTIVATIONS.items())}
_TABLES = {
    "vocab_size": "word_embeddings",
    "max_position_embeddings": "position_embeddings",
    "type_vocab_size": "token_type_embeddings",
}


def described(model: nn.Module) -> "BertConfig":
    """A copy of model.config that says what the modules are: the numbers of layers, rows of the
    tables, inner units and classes, eps, activation, and whether a decoder is tied. A model made
    of it takes the model's weights and computes the same; rates of dropout stay the config's.

    Raises: ValueError where no configuration can say it (layers that differ, pruned heads,
    adapters, parametrizations), or for a frozen model.
    """
    config, own, wrong = copy.deepcopy(model.config), model.state_dict(), []
    for name, values in _read(model, own).items():
        if len(values) > 1 or None in values:
            wrong.append(f"{name} is {' and '.join(sorted(map(str, values)))} in its modules")
        elif values != {_value(config, name)}:
            setattr(config, name, *(_NAMES[v] if name == "hidden_act" else v for v in values))
    wrong = wrong or _misfits(model, config, own)
    if wrong:
        raise ValueError(
            f"this {type(model).__name__} can't be saved, for no {type(config).__name__} describes "
            f"it: {'; '.join(wrong[:3])}{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}. "
            "Merge adapters (peft's merge_and_unload), remove parametrizations, or put plain "
            "modules of one size back; torch.save(model.state_dict(), ...) keeps the weights"
        )
    return config


def _value(config, name):
    value = getattr(config, name, None)
    return ACTIVATIONS[value] if name == "hidden_act" else value


def _read(model, own) -> dict[str, set]:
    """Each setting that modules can contradict: the values that they have."""
    found = defaultdict(set)
    for m in model.modules():
        if isinstance(m, BertEncoder):
            found["num_hidden_layers"].add(len(m.layer))
        if isinstance(m, BertEmbeddings):
            for name, table in _TABLES.items():
                _rows(found[name], getattr(m, table))
        if isinstance(m, BertIntermediate):
            _rows(found["intermediate_size"], m.dense)
        if not _is_own(m):  # somebody's, whose names may be the same
            continue
        for act in ("intermediate_act_fn", "transform_act_fn"):
            if act in m._modules:
                found["hidden_act"].add(kernel_of(getattr(m, act)))
        norm = m._modules.get("LayerNorm")
        if isinstance(norm, nn.LayerNorm):
            found["layer_norm_eps"].add(norm.eps)
    if _is_own(model) and "classifier" in model._modules:
        _rows(found["num_labels"], model.classifier)
    for name, shared in model.tied.items():
        if shared == f"{model.base_model_prefix}.embeddings.word_embeddings.weight":
            tied = name in own and own[name].data_ptr() == own[shared].data_ptr()
            found["tie_word_embeddings"].add(tied)
    return {name: values for name, values in found.items() if values}


def _rows(values: set, m) -> None:
    """Adds those of a plain module's weight; what another has, `_misfits` says."""
    if isinstance(m, nn.Linear | nn.Embedding):
        values.add(m.weight.shape[0])


class _Undrawn(TorchFunctionMode):
    """Weights without their random numbers; those of meta tensors would bring torch's compiler:
    200 MB, seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        drawn = getattr(function, "__module__", None) == nn.init.__name__
        return kwargs["tensor"] if drawn else function(*args, **kwargs)


def _misfits(model, config, own) -> list[str]:
    """What of the weights a model made of the configuration would not take; of somebody's subclass,
    whose own modules may be anything, what of the encoder's."""
    from .bert import BertModel

    prefix = f"{model.base_model_prefix}." if model.base_model_prefix in model._modules else ""
    if not isinstance(getattr(model, model.base_model_prefix, model), BertModel):
        return []
    cls, before = (type(model), "") if _is_own(model) else (BertModel, prefix)
    with torch.device("meta"), _Undrawn():
        expected = {f"{before}{name}": t for name, t in cls(config).state_dict().items()}
    inside = f"{prefix}encoder.", f"{prefix}embeddings."
    added = [name for name in own if name.startswith(inside) and name not in expected]
    wrong = [f"{name} is not BERT's" for name in added]
    for name, t in expected.items():
        if name not in own and not name.startswith(f"{prefix}pooler."):
            wrong.append(f"{name} is missing")
        elif name in own and own[name].shape != t.shape:
            wrong.append(f"{name} is {list(own[name].shape)}, expected {list(t.shape)}")
    return wrong


def _is_own(m) -> bool:
    return type(m).__module__.startswith(f"{__package__}.")
