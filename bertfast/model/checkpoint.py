"""Checkpoints: safetensors in, with their faults found before anything is built, and out again."""

import json
import os
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..files import write_whole

SAFETENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
RENAMED = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, unsafe or made for another model."""


def resolve(name_or_folder) -> Path:
    """The local folder of a checkpoint; a hub name is fetched (or found in the hub's cache)."""
    folder = Path(name_or_folder)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file, expected the folder that holds config.json")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                str(name_or_folder),
                allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", PICKLE],
            )
        )
    except Exception as e:
        raise CheckpointError(
            f"{str(name_or_folder)!r} is no local folder, and the hub did not give it: {e}"
        ) from e


def files(folder: Path, allow_pickle: bool = False) -> list[Path]:
    """The weight files of a folder, all inside it."""
    if (folder / SAFETENSORS).is_file():
        return [folder / SAFETENSORS]
    if (folder / INDEX).is_file():
        return _indexed(folder, INDEX)
    for name in (PICKLE, PICKLE_INDEX):
        if (folder / name).is_file():
            if not allow_pickle:
                raise CheckpointError(
                    f"{folder} holds its weights as a pickle ({name}), which can run code when "
                    "read; convert it to safetensors, or pass allow_pickle=True (--allow-pickle) "
                    "if you trust it: it is then read with weights_only"
                )
            return [folder / name] if name == PICKLE else _indexed(folder, name)
    raise CheckpointError(f"{folder} has no weights: expected {SAFETENSORS} or {INDEX}")


def _indexed(folder, name) -> list[Path]:
    index = _read_json(folder / name)
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
        raise CheckpointError(f"{folder / name} has no weight_map of parameter names to files")
    paths = []
    for shard in sorted(set(shards.values())):
        if os.path.basename(shard) != shard or shard in ("", ".", ".."):
            raise CheckpointError(
                f"{folder / name} points to {shard!r}, outside its folder: refused"
            )
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder / name} names {shard!r}, which is not there")
        paths.append(folder / shard)
    return paths


def _read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not there: is this a checkpoint's folder?") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise CheckpointError(f"{path} is no JSON: {e}") from None


def verify(folder, allow_pickle: bool = False) -> None:
    """Check a local checkpoint without building a model: configuration, index, and that every
    safetensors file is whole. Raises CheckpointError."""
    folder = Path(folder)
    _read_json(folder / "config.json")
    for path in files(folder, allow_pickle):
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt"):
                    pass  # the header's sizes must add up to the file's
            except (SafetensorError, OSError) as e:
                raise CheckpointError(f"{path} is corrupt or truncated: {e}") from None


def read(folder: Path, allow_pickle: bool = False) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by name."""
    verify(folder, allow_pickle)
    tensors = {}
    for path in files(folder, allow_pickle):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as f:
                tensors |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        else:
            try:
                tensors |= torch.load(path, map_location="cpu", weights_only=True)
            except Exception as e:
                raise CheckpointError(f"{path} can't be read with weights_only: {e}") from None
    return tensors


def _rename(name: str) -> str:
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


def _aligned(name: str, expected: set[str], prefix: str) -> str:
    """The model's name for a checkpoint's tensor: with or without the base model's prefix."""
    for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        if candidate in expected:
            return candidate
    return name


def load(cls, name_or_folder, allow_pickle, dtype, overrides):
    """The body of `from_pretrained`."""
    folder = resolve(name_or_folder)
    # transformers would read a wrong model_type with BERT's defaults, and say nothing.
    kind = _read_json(folder / "config.json").get("model_type", "bert")
    if kind != "bert":
        raise CheckpointError(f"{folder} holds a {kind!r} model, expected 'bert'")
    tensors = read(folder, allow_pickle)
    config = cls.config_class.from_pretrained(folder, **overrides)
    model = cls(config)
    own = model.state_dict()
    found = {
        _aligned(_rename(name), set(own), cls.base_model_prefix): t for name, t in tensors.items()
    }
    wrong = [
        f"{name} is {list(found[name].shape)}, expected {list(own[name].shape)}"
        for name in own
        if name in found and found[name].shape != own[name].shape
    ]
    if wrong:
        raise CheckpointError(
            f"{folder} does not fit the configuration: {'; '.join(wrong[:5])}"
            + (" (a head of another size? Remove it from the checkpoint or keep num_labels)")
        )
    new = [name for name in own if name not in found and cls.tied.get(name, name) not in found]
    if len(new) == len(own):
        raise CheckpointError(f"{folder} holds no weight of a {cls.__name__}")
    if new:
        warnings.warn(
            f"{cls.__name__}: not in {folder}, newly initialised, to be trained: {', '.join(new)}",
            stacklevel=3,
        )
    model.load_state_dict({k: t for k, t in found.items() if k in own}, strict=False)
    model.new_weights = new
    model.unused_weights = sorted(set(found) - set(own))
    return (model if dtype is None else model.to(dtype)).eval()


def save(model, folder) -> None:
    """The body of `save_pretrained`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shared = getattr(model, "tied", {})
    tensors = {
        name: t.detach().cpu().contiguous()
        for name, t in model.state_dict().items()
        if name not in shared or t.data_ptr() != model.state_dict()[shared[name]].data_ptr()
    }
    config = model.config.__class__.from_dict(model.config.to_dict())
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    write_whole(folder / "config.json", lambda p: Path(p).write_text(config.to_json_string()))
    write_whole(folder / SAFETENSORS, lambda p: save_file(tensors, p, metadata={"format": "pt"}))
