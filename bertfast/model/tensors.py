"""The weights of a checkpoint's files, by the name that each has whoever wrote it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..files import read_json, regular
from .errors import CheckpointError, unreadable

SAFETENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
RENAMED = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
# What torch puts between names: nn.DataParallel and DDP, torch.compile, FSDP, checkpoint_wrapper.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def files(folder: Path, allow_pickle: bool = False) -> list[Path]:
    """The weight files of a folder, all inside it; no pickle unless they may be."""
    for name in (SAFETENSORS, INDEX, PICKLE, PICKLE_INDEX):
        if not (folder / name).exists():
            continue
        with unreadable():
            regular(folder / name)
        found = sorted(set(_index(folder, name).values())) if name.endswith(".json") else [name]
        pickles = [f for f in found if not f.endswith(".safetensors")]
        if pickles and not allow_pickle:
            raise CheckpointError(
                f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code when "
                "read; convert it to safetensors, or pass allow_pickle=True (--allow-pickle) "
                "if you trust it: it is then read with weights_only"
            )
        return [folder / f for f in found]
    raise CheckpointError(f"{folder} has no weights: expected {SAFETENSORS} or {INDEX}")


def _index(folder, name) -> dict[str, str]:
    """The file of each parameter, all of them in the folder."""
    with unreadable():
        index = read_json(folder / name)
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
        raise CheckpointError(f"{folder / name} has no weight_map of parameter names to files")
    for shard in set(shards.values()):
        if os.path.basename(shard) != shard or shard in ("", ".", "..") or "\0" in shard:
            raise CheckpointError(
                f"{folder / name} points to {shard!r:.200}, outside its folder: refused"
            )
        with unreadable(folder / name):  # names that no file can have
            if not (folder / shard).exists():
                raise CheckpointError(f"{folder / name} names {shard!r}, which is not there")
            regular(folder / shard)
    return shards


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    with unreadable(f"{path} is corrupt or truncated"), safe_open(path, framework="pt") as f:
        yield f


def read(folder: Path, allow_pickle: bool = False) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by name. Raises CheckpointError."""
    tensors, where = {}, {}
    for path in files(folder, allow_pickle):
        if path.suffix == ".safetensors":
            with opened(path) as f:
                part = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        else:
            part = _unpickled(path)
        for name in part:
            if where.setdefault(name, path) != path:
                raise CheckpointError(f"{name} is in both {where[name]} and {path}: remove one")
        tensors |= part
    return tensors


def _unpickled(path) -> dict[str, torch.Tensor]:
    with unreadable(f"{path} can't be read with weights_only"):
        found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, dict) or not all(
        isinstance(name, str)
        and isinstance(t, torch.Tensor)
        and (t.layout, t.device.type) == (torch.strided, "cpu")
        for name, t in found.items()
    ):
        raise CheckpointError(f"{path} is no dictionary of dense tensors: save a state_dict()")
    return found


def canonical(name: str, prefix: str) -> str:
    """What a tensor is called whoever wrote it: without the base model's prefix and wrappers'."""
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return ".".join(p for p in name.split(".") if p not in _WRAPPERS).removeprefix(f"{prefix}.")


def by_name(folder: Path, tensors: Any, prefix: str) -> tuple[dict, dict]:
    """(tensors, names in the file) by canonical name."""
    found, spelled = {}, {}
    for name, t in tensors.items():
        own = canonical(name, prefix)
        if own in found and not _same(found[own], t):
            raise CheckpointError(
                f"{folder} holds both {spelled[own]} and {name}, two names of one weight, and they "
                "differ: remove one"
            )
        found[own], spelled[own] = t, name
    return found, spelled


def _same(a, b) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)
