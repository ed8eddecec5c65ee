"""Models of a task, opened from a folder, with the checkpoint's head or a new one.

BERT is ours; every other is transformers' own class, on our kernels by `accelerate`.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from ..dropin import accelerate
from ..files import read_json, regular
from ..model import BertModel, BertPreTrainedModel, checkpoint
from ..model.config import CONFIG
from ..model.config import read as read_config
from ..model.errors import unreadable
from ..model.tensors import opened
from .config import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Head(NamedTuple):
    """What of a task's model is not its encoder."""

    name: str  # of transformers' classes: BertFor..., AutoModelFor...
    native: type[BertPreTrainedModel]
    outputs: str  # BERT's own linear layer for it
    per_token: bool  # whether it has outputs for each token, or for a sequence

    def of_another(self, config: "PreTrainedConfig") -> str | None:
        """The models that a checkpoint's head is of, where those are others: its weights may have
        the same names all the same."""
        names = config.architectures or ()
        own = not names or any(name.endswith(f"For{self.name}") for name in names)
        return None if own else ", ".join(names)


def read_configuration(folder: Path) -> "PreTrainedConfig":
    """Of any family; BERT's with every value checked. Raises CheckpointError."""
    if not (folder / CONFIG).exists():
        raise checkpoint.CheckpointError(
            f"{folder / CONFIG} is not there: is this a checkpoint's folder?"
        )
    with unreadable():
        values = read_json(folder / CONFIG)
    if not isinstance(values, dict) or values.get("model_type", "bert") == "bert":
        return read_config(folder / CONFIG)
    from transformers import AutoConfig

    with unreadable(folder / CONFIG):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def verify(folder: Path, allow_pickle: bool = False) -> None:
    """Check a checkpoint without building a model: its configuration, and that every safetensors
    file is whole. Raises CheckpointError."""
    read_configuration(folder)
    for path in checkpoint.files(folder, allow_pickle):
        regular(path)
        if path.suffix == ".safetensors":
            with opened(path):
                pass  # the header's sizes must add up to the file's


def pretrained(
    folder: Path, head: Head, which: str, outputs: int | None, allow_pickle: bool
) -> tuple[nn.Module, tuple[str, ...]]:
    """(a checkpoint's model with a task's head, whether that is new).

    which: "fresh" makes a new one, whatever there is; "keep" needs the checkpoint's; "auto" takes
    that, where there is one. outputs: how many a new one has; None: the configuration says.
    """
    model, new = _pretrained(folder, head, which == "fresh", outputs, allow_pickle)
    if new and which == "keep":
        raise ConfigError(
            f"head is 'keep', but {folder} has none for this task ({head.name}): give --head "
            "fresh, or leave it out"
        )
    return model, new


def _pretrained(folder, head, fresh, outputs, allow_pickle):
    config = read_configuration(folder)
    fresh = fresh or head.of_another(config) is not None
    if config.model_type == "bert":
        return _native(folder, head, fresh, outputs, allow_pickle)
    if not fresh:
        model, lacking = _stock(folder, f"AutoModelFor{head.name}", allow_pickle)
        fresh = bool(lacking)
    if fresh:
        model = _renewed(folder, head, outputs, allow_pickle)
    accelerate(model)
    return model.eval(), fresh


def _renewed(folder, head, outputs, allow_pickle):
    """transformers' model with the folder's encoder and a head as its class draws it."""
    import transformers

    base, lacking = _stock(folder, "AutoModel", allow_pickle)
    lacking = [n for n in lacking if not n.startswith("pooler.")]  # some leave it out
    if lacking:
        raise checkpoint.CheckpointError(
            f"{folder} lacks weights of the encoder: {', '.join(lacking[:5])}"
        )
    config = base.config
    if outputs is not None:
        config.num_labels = outputs
    model = getattr(transformers, f"AutoModelFor{head.name}").from_config(config)
    own = model.base_model.state_dict()
    found = base.state_dict()
    if {*own} - {*found}:  # some have a pooler for this head alone
        base, _ = _stock(folder, "AutoModel", allow_pickle, add_pooling_layer=True)
        found = base.state_dict()
    model.base_model.load_state_dict({name: found[name] for name in own})
    return model


def _native(folder, head, fresh, outputs, allow_pickle):
    cls = head.native
    if fresh:
        with warnings.catch_warnings():
            if head.per_token:  # which has no use for a pooler, whatever the folder lacks
                warnings.simplefilter("ignore")
            bert = BertModel.from_pretrained(folder, allow_pickle=allow_pickle)
        model = cls(bert.config).eval()
        if model.bert.pooler is None:
            bert.pooler = None
        model.bert, new = bert, True
    else:
        model = cls.from_pretrained(folder, allow_pickle=allow_pickle)
        new = f"{head.outputs}.weight" in model.new_weights
    if new:
        config = model.config
        linear = nn.Linear(config.hidden_size, config.num_labels if outputs is None else outputs)
        nn.init.normal_(linear.weight, std=config.initializer_range)
        nn.init.zeros_(linear.bias)
        setattr(model, head.outputs, linear)
    return model, new


@contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and tables that transformers shows for each model."""
    from transformers.utils import logging

    on, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if on:
            logging.enable_progress_bar()


def _stock(folder, auto: str, allow_pickle, **options):
    """(transformers' model, the names of weights that the folder lacks)."""
    import transformers

    with unreadable(folder), warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        model, info = getattr(transformers, auto).from_pretrained(
            folder,
            output_loading_info=True,
            use_safetensors=None if allow_pickle else True,
            dtype=torch.float32,
            trust_remote_code=False,
            **options,
        )
    return model, sorted(info["missing_keys"])


def trained(folder: Path, head: Head, allow_pickle: bool) -> nn.Module:
    """A fine-tuned model: CheckpointError where its head would be a new one."""
    config = read_configuration(folder)
    other = head.of_another(config)
    model = lacking = None
    if other is None and config.model_type == "bert":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = head.native.from_pretrained(folder, allow_pickle=allow_pickle)
        lacking = model.new_weights
    elif other is None:
        model, lacking = _stock(folder, f"AutoModelFor{head.name}", allow_pickle)
        accelerate(model)
    if other or lacking:
        why = f"but a {other}" if other else f"it lacks {', '.join(lacking[:3])}"
        raise checkpoint.CheckpointError(
            f"{folder} is no fine-tuned model for this task ({head.name}), {why}"
        )
    checkpoint.check_finite(model, folder)
    return model.eval()
