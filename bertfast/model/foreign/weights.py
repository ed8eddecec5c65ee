"""The weights of a checkpoint under transformers' names, and the configuration that they make."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...files import read_json
from ..config import read as read_config
from ..errors import CheckpointError, unreadable
from .classes import FAMILIES
from .stored import FLOATS, Stored

if TYPE_CHECKING:
    from transformers import BertConfig

    from .source import Source

_LABELLED = "classifier.weight", "classifier.out_proj.weight"
_SIZES = "vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"
_SIZES += "type_vocab_size", "num_labels", "embedding_size", "dim", "hidden_dim"


@dataclass(frozen=True)
class Weight:
    """A tensor under its own name; other frameworks keep the matrix of a Linear transposed."""

    own: str
    stored: Stored
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape[::-1] if self.transposed else self.stored.shape

    def read(self) -> torch.Tensor:
        t = self.stored.read()
        return t.t() if self.transposed else t


def renamed(source: "Source", stored: Any, kept: Any) -> dict[str, Weight]:
    """Those of `stored` that are kept, by transformers' name. Raises CheckpointError."""
    found = {}
    for own in kept:
        name, transposed = source.rename(own)
        weight = Weight(own, stored[own], transposed)
        if name in found:
            raise CheckpointError(
                f"{source.path} has {own} and {found[name].own}, two of one weight: --ignore one"
            )
        if weight.stored.dtype not in FLOATS:
            raise CheckpointError(
                f"{source.path}: {own} is {weight.stored.dtype}, expected {', '.join(FLOATS)}; "
                "--ignore it if it is no weight"
            )
        found[name] = weight
    return found


def values(source: "Source", given: Any) -> tuple[dict, Path]:
    """(what the configuration says, its file). Raises CheckpointError."""
    beside = [source.folder / name for name in source.configs]
    path = Path(given) if given else next((p for p in beside if p.exists()), beside[0])
    if not path.exists():
        raise CheckpointError(
            f"{path} is not there: put the checkpoint's configuration there, or give it by --config"
        )
    with unreadable():
        found = read_json(path)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds {found!r:.80}, expected names and values in braces")
    return found, path


def settings(
    source: "Source", path: Path, said: dict[str, Any], weights: Mapping[str, Weight]
) -> "BertConfig":
    """transformers' configuration, which has as many labels as the head. Raises CheckpointError."""
    kind = said.get("model_type", source.model_type)
    if kind not in FAMILIES:
        raise CheckpointError(
            f"{path}: model_type is {kind!r:.80}, expected one of {', '.join(FAMILIES)}"
        )
    if source.model_type and "num_attention_heads" not in said:
        raise CheckpointError(
            f"{path} has no num_attention_heads, which no tensor tells: add it, or give the "
            "checkpoint's own configuration by --config"
        )
    labels = {}
    if not {"id2label", "num_labels"} & said.keys():
        heads = [weights[name].shape for name in _LABELLED if name in weights]
        labels = {"num_labels": heads[0][0]} if heads and heads[0] else {}
    if kind == "bert":
        return read_config(path, **labels)
    from transformers import CONFIG_MAPPING

    with unreadable(path):
        return CONFIG_MAPPING[kind].from_dict(said, **labels)


def check_shapes(
    source: "Source", path: Path, config: "BertConfig", chosen: Any, weights: Mapping[str, Weight]
) -> None:
    """CheckpointError where the class has another size for a weight."""
    for name, weight in weights.items():
        expected = chosen.shapes.get(name, weight.shape)
        if weight.shape == expected:
            continue
        wrong = {e for e, n in zip(expected, weight.shape, strict=False) if e != n}
        said = [f"{n} is {v}" for n in _SIZES if (v := getattr(config, n, None)) in wrong]
        raise CheckpointError(
            f"{source.path} does not fit {path}: {weight.own} is {list(weight.stored.shape)}, "
            f"expected {list(expected[::-1] if weight.transposed else expected)}"
            f"{' as ' * bool(said)}{', '.join(said)}; correct it, or give the checkpoint's own "
            "configuration by --config"
        )
