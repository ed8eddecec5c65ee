"""How a model reads text: the columns and the length it was trained with, and a tokenizer that
fits it."""

from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .. import data
from ..files import StrPath
from ..model import checkpoint
from . import networks, tasks
from .config import ConfigError, read_yaml
from .outputs import RUN_CONFIG, say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LONGEST = 512  # tokens a text is cut to, where the model takes more or says nothing


def _defaults(kind: str) -> dict:
    """Of a task's settings. How long a text may be the model says."""
    config = tasks.module(kind).Task.Config
    return {f.name: f.default for f in fields(config)} | {"max_length": None}


def remembered(
    folder: Path, kind: str = "classify", names: Collection[str] = ("text_pair_column",)
) -> dict:
    """The settings of these names that the run which left `folder` was trained with; {} of no
    run."""
    path = folder / RUN_CONFIG
    try:
        config = tasks.module(kind).Task.Config
        return read_yaml(path, config, only=names) if path.is_file() else {}
    except (ConfigError, ImportError) as e:
        say(f"warning: how the model was trained is not known: {e}")
        return {}


def as_trained(folder: Path, kind: str = "classify", **given: Any) -> dict:
    """What is `given`; for None what the run that left `folder` was trained with, or else the
    default of that kind of task. "" stands for no column. Says which come from the run, where they
    are not the default's, and where `given` differs from it."""
    known, defaults = remembered(folder, kind, given), _defaults(kind)
    chosen = defaults | known
    used = [
        f"{name} {known[name]!r}"
        for name, value in given.items()
        if value is None and name != "max_length" and chosen[name] != defaults[name]
    ]
    if used:
        say(f"as in {folder / RUN_CONFIG}: {', '.join(used)}")
    for name, value in given.items():
        if value is not None:
            chosen[name] = None if value == "" and name != "text_column" else value
            if name in known and chosen[name] != known[name]:
                say(f"note: {name} is {chosen[name]!r}, the model was trained with {known[name]!r}")
    return {name: chosen[name] for name in given}


def check(
    tokenizer: "PreTrainedTokenizerBase",
    model: nn.Module,
    folder: StrPath,
    max_length: int | None,
    pairs: bool,
) -> int:
    """Tokens a text (or pair) is cut to: `max_length`, or 512 or what the model takes.

    CheckpointError where the tokenizer gives ids or, for pairs, token types that the model has no
    embedding for; ConfigError where the length is not the model's.
    """
    size, config = max(tokenizer.get_vocab().values(), default=-1) + 1, model.config
    if size > config.vocab_size:
        raise checkpoint.CheckpointError(
            f"{folder}: the tokenizer has {size} tokens, the model embeddings for "
            f"{config.vocab_size}: give the model its own tokenizer, or more embeddings "
            f"(transformers: model.resize_token_embeddings({size}))"
        )
    types = max(data.encode(tokenizer, ["a"], ["a"])[0].get("token_type_ids", [0])) + 1
    if networks.padded(model) and getattr(config, "summary_type", None) == "last":
        raise checkpoint.CheckpointError(
            f"{folder}: a {type(model).__name__} reads the last place of a padded row, where only "
            "the longest text has a token: give a model of another family"
        )
    known = getattr(config, "type_vocab_size", None) or types  # XLNet takes any
    if pairs and networks.takes_types(model) and types > known:
        raise checkpoint.CheckpointError(
            f"{folder}: the tokenizer marks a pair by {types} token types, the model has "
            f"{known}: give single texts"
        )
    limit = networks.longest(model)
    if max_length is None:
        return min(_LONGEST, limit or _LONGEST)
    if limit is not None and max_length > limit:
        raise ConfigError(f"max_length is {max_length}, the model takes up to {limit}")
    specials = tokenizer.num_special_tokens_to_add(pair=pairs)
    if max_length <= specials:
        raise ConfigError(
            f"max_length is {max_length}, expected more than the {specials} special tokens"
        )
    return max_length


def encoded_rows(
    tokenizer: "PreTrainedTokenizerBase",
    examples: data.Examples,
    labels: data.LabelSet | None,
    max_length: int | None,
) -> list[dict]:
    """Rows of token ids, with labels where a `LabelSet` is given."""
    rows = data.encode(tokenizer, examples.texts, examples.pairs, max_length)
    if labels is not None:
        for row, target in zip(rows, labels.encode(examples), strict=True):
            row["labels"] = target
    return rows


def warn_unknown(tokenizer: "PreTrainedTokenizerBase", rows: list[dict], pairs: bool) -> None:
    """Says so where many of the rows' tokens are unknown to the tokenizer."""
    share = data.unknown_share(tokenizer, rows, pairs)
    if share > data.UNKNOWN:
        say(f"warning: {data.unknown_text(share)}")
