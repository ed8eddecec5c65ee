"""Training state on disk: written whole or not at all, checked by checksum when read."""

import hashlib
import json
import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from .ranks import full, like

STATE = "state.json"


def _sync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(path) -> str:
    with open(path, "rb") as f:
        return (
            hashlib.file_digest(f, "sha256").hexdigest()
            if sys.version_info >= (3, 11)
            else (hashlib.sha256(f.read()).hexdigest())
        )


def rng_state() -> dict:
    """Python's, NumPy's and torch's generators as JSON; a GPU's generator too."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
    }
    if torch.cuda.is_available():
        state["cuda"] = [bytes(s.tolist()).hex() for s in torch.cuda.get_rng_state_all()]
    return state


def set_rng_state(state: dict) -> None:
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(_bytes(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([_bytes(s) for s in state["cuda"]])


def _bytes(text):
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


def gather(model, optimizer) -> tuple[dict, dict]:
    """(parameters by name, optimizer state by "name|key"), whole tensors; all ranks together."""
    names = {id(p): name for name, p in model.named_parameters()}
    moments = {
        f"{names[id(p)]}|{key}": full(torch.as_tensor(value)).contiguous()
        for group in optimizer.param_groups
        for p in group["params"]
        for key, value in optimizer.state.get(p, {}).items()
    }
    return {name: full(p.detach()).contiguous() for name, p in model.named_parameters()}, moments


def save(folder: Path, step: int, tensors: tuple[dict, dict], state: dict, keep: int) -> Path:
    """Write `folder`/step-N from a temporary sibling, synced and renamed, then drop old ones.

    tensors: what `gather` gave. state: JSON values. A failure (a full disk, say) leaves the
    checkpoints before as they were.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        files = dict(zip(("model.safetensors", "optimizer.safetensors"), tensors, strict=True))
        for name, values in files.items():
            save_file(values, temporary / name)
            _sync(temporary / name)
        sums = {name: checksum(temporary / name) for name in files}
        body = {"step": step, "rng": rng_state(), **state}
        text = json.dumps({"sha256": sums, "state": body})
        digest = hashlib.sha256(text.encode()).hexdigest()
        with open(temporary / STATE, "w") as f:
            f.write(digest + "\n" + text)
            f.flush()
            os.fsync(f.fileno())
        _sync(temporary)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        _sync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(folder.glob("step-*"))


def read_state(checkpoint: Path) -> dict:
    """The JSON state of a checkpoint whose every checksum holds; ValueError names what doesn't."""
    try:
        digest, text = (checkpoint / STATE).read_text().split("\n", 1)
        if hashlib.sha256(text.encode()).hexdigest() != digest:
            raise ValueError(f"{checkpoint / STATE} does not match its checksum")
        body = json.loads(text)
        for name, expected in body["sha256"].items():
            if checksum(checkpoint / name) != expected:
                raise ValueError(f"{checkpoint / name} does not match its checksum")
    except OSError as e:
        raise ValueError(f"{checkpoint} is no whole checkpoint: {e}") from None
    return body["state"]


def latest(folder: Path, warn) -> tuple[Path, dict] | None:
    """The newest whole checkpoint and its state; `warn` hears of each damaged one passed over."""
    for checkpoint in reversed(checkpoints(folder)):
        try:
            return checkpoint, read_state(checkpoint)
        except ValueError as e:
            warn(f"{e}; trying the checkpoint before it")
    return None


def restore(checkpoint: Path, model, optimizer) -> None:
    """Parameters and optimizer state, in place."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in load_file(checkpoint / "model.safetensors").items():
            parameters[name].copy_(like(value, parameters[name]))
    for key, value in load_file(checkpoint / "optimizer.safetensors").items():
        name, field = key.rsplit("|", 1)
        p = parameters[name]
        optimizer.state[p][field] = value
        if field != "step":
            optimizer.state[p][field] = like(value, p)
        elif optimizer.defaults.get("fused"):
            optimizer.state[p][field] = value.to(p.device)
