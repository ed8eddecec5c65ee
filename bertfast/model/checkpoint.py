"""Checkpoints: safetensors in, with their faults found before anything is built, and out again."""

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import nn

from ..files import StrPath, write_whole
from .config import CONFIG, DTYPES
from .config import read as read_config
from .described import described
from .errors import CheckpointError, unreadable
from .tensors import PICKLE, SAFETENSORS, by_name, canonical, files, opened, read

if TYPE_CHECKING:
    from .bert import BertPreTrainedModel

M = TypeVar("M", bound="BertPreTrainedModel")
_SIZES = {  # of a configuration -> the weight that has it, and its dimension
    "vocab_size": ("embeddings.word_embeddings.weight", 0),
    "hidden_size": ("embeddings.word_embeddings.weight", 1),
    "max_position_embeddings": ("embeddings.position_embeddings.weight", 0),
    "type_vocab_size": ("embeddings.token_type_embeddings.weight", 0),
}
_BUFFERS = {"embeddings.position_ids", "embeddings.token_type_ids"}  # floats where all was cast
_INNER = {"intermediate_size": ("encoder.layer.0.intermediate.dense.weight", 0)}


def resolve(name_or_folder: StrPath, weights: bool = True) -> Path:
    """The local folder of a checkpoint; a hub name is fetched (or found in the hub's cache)."""
    folder = Path(name_or_folder)
    with unreadable(f"{str(name_or_folder)!r:.200} is no name of a folder"):
        if folder.is_dir():
            return folder
        if folder.exists():
            raise CheckpointError(f"{folder} is a file, expected the folder that holds config.json")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.model"] + ["*.safetensors", PICKLE] * weights
    with unreadable(f"{str(name_or_folder)!r} is no local folder, and the hub did not give it"):
        return Path(snapshot_download(str(name_or_folder), allow_patterns=patterns))


def verify(folder: StrPath, allow_pickle: bool = False) -> None:
    """Check a local checkpoint without building a model: configuration, index, and that every
    safetensors file is whole. Raises CheckpointError."""
    folder = Path(folder)
    read_config(folder / CONFIG)
    for path in files(folder, allow_pickle):
        if path.suffix == ".safetensors":
            with opened(path):
                pass  # the header's sizes must add up to the file's


def _check_sizes(folder, config, found, fewer: bool) -> None:
    """That the configuration's numbers are the weights', before anything is built of them; `fewer`
    layers where that was asked for."""
    has = len({m[1] for n in found if (m := re.match(r"encoder\.layer\.([0-9]+)\.", n))})
    wanted = config.num_hidden_layers
    for number, (name, dim) in (_SIZES | (_INNER if wanted else {})).items():
        if name not in found:
            some = ", ".join(sorted(found)[:3])
            raise CheckpointError(f"{folder} holds no {name}, as BERT's do, but {some}, ...")
        shape, value = list(found[name].shape), getattr(config, number)
        if len(shape) != 2 or shape[dim] != value:
            raise CheckpointError(
                f"{folder} does not fit its configuration: {number} is {value}, but {name} is "
                f"{shape}; correct {CONFIG}, or give the weights that belong to it"
            )
    if wanted > has or (wanted < has and not fewer):
        raise CheckpointError(
            f"{folder} does not fit its configuration: num_hidden_layers is {wanted}, but it holds "
            f"{has} layers; correct {CONFIG}" + (", or ask for fewer" if wanted < has else "")
        )


def _check_parameter(folder, name, given, own, dtype) -> None:
    if given.dtype not in DTYPES:
        raise CheckpointError(
            f"{folder}: {name} is {str(given.dtype).removeprefix('torch.')}, expected a float of "
            "16 bits or more: dequantise the model with what made it, and save it in float"
        )
    if given.shape != own.shape:
        raise CheckpointError(
            f"{folder} does not fit its configuration: {name} is {list(given.shape)}, expected "
            f"{list(own.shape)} (a head of another size? Remove it from the checkpoint or keep "
            "num_labels)"
        )
    limit = torch.finfo(dtype).max
    if limit < torch.finfo(given.dtype).max and limit < given.abs().max() < torch.inf:
        raise CheckpointError(f"{folder}: {name} holds numbers beyond {dtype}, {limit:.3g}")


def _check_encoder(folder, config, own, found, spelled) -> None:
    """That all of an encoder is there, and nothing that ours would not compute; `own` and `found`
    by canonical name."""
    layers = "|".join(map(str, range(config.num_hidden_layers)))
    inside = re.compile(rf"embeddings\.|encoder\.layer\.({layers})\.").match
    lacking = sorted(name for name in own - found.keys() if inside(name))
    other = sorted(name for name in found.keys() - own - _BUFFERS if inside(name))
    more = [spelled[name] for name in other if found[name].dtype in DTYPES]
    if lacking:
        raise CheckpointError(
            f"{folder} lacks weights of the encoder: {', '.join(lacking[:5])}"
            + (f"; instead it has {', '.join(more[:3])}" if more else "")
        )
    if more:
        raise CheckpointError(
            f"{folder} has weights in its encoder that BERT's has no place for: "
            f"{', '.join(more[:5])}; merge adapters, or remove what has no effect"
        )


def load(
    cls: type[M],
    name_or_folder: StrPath,
    allow_pickle: bool,
    dtype: torch.dtype | None,
    overrides: dict[str, Any],
) -> M:
    """The body of `from_pretrained`."""
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(map(str, DTYPES))}")
    folder = resolve(name_or_folder)
    config = read_config(folder / CONFIG, cls.config_class, **overrides)
    found, spelled = by_name(folder, read(folder, allow_pickle), cls.base_model_prefix)
    _check_sizes(folder, config, found, "num_hidden_layers" in overrides)
    model = cls(config)
    own = model.state_dict()
    names = {name: canonical(name, cls.base_model_prefix) for name in own}
    _check_encoder(folder, config, set(names.values()), found, spelled)
    given = {name: found[n] for name, n in names.items() if n in found}
    for name, t in given.items():
        _check_parameter(folder, name, t, own[name], dtype or own[name].dtype)
    for name, other in cls.tied.items():
        one = {name, other} <= given.keys() and own[name].data_ptr() == own[other].data_ptr()
        if one and not torch.equal(given[name], given[other]):
            raise CheckpointError(
                f"{folder}: {name} and {other} differ, but are one parameter in a "
                f"{cls.__name__}: remove one, or set tie_word_embeddings to false"
            )
    filled = {own[name].data_ptr() for name in given}  # a tied weight by either of its names
    new = [name for name, t in own.items() if name not in given and t.data_ptr() not in filled]
    if new:
        warnings.warn(
            f"{cls.__name__}: not in {folder}, newly initialised, to be trained: {', '.join(new)}",
            stacklevel=3,
        )
    model.load_state_dict(given, strict=False)
    model.new_weights = new
    model.unused_weights = sorted(spelled[n] for n in found.keys() - set(names.values()))
    return (model if dtype is None else model.to(dtype)).eval()


def check_finite(model: nn.Module, folder: StrPath) -> None:
    """CheckpointError where a weight is NaN or infinite: a class, the largest of the logits, comes
    out of those all the same."""
    for name, t in model.state_dict().items():
        if t.numel() and not torch.isfinite(t.sum(dtype=torch.float64)):
            raise CheckpointError(
                f"{folder}: {name} holds NaN or infinite numbers: the checkpoint is damaged or of "
                "a run that diverged; take an earlier one"
            )


def save(model: nn.Module, folder: StrPath) -> None:
    """The body of `save_pretrained`."""
    config = described(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    tensors = {name: t.detach().cpu().contiguous() for name, t in state.items()}
    for name, other in getattr(model, "tied", {}).items():
        if state[name].data_ptr() != state[other].data_ptr():
            continue
        if config.tie_word_embeddings:
            del tensors[name]
        else:  # transformers then reads both
            tensors[name] = tensors[name].clone()
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    write_whole(folder / "config.json", lambda p: Path(p).write_text(config.to_json_string()))
    write_whole(folder / SAFETENSORS, lambda p: save_file(tensors, p, metadata={"format": "pt"}))
