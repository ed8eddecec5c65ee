"""Training state on disk: written whole or not at all, checked by checksum when read."""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..files import json_text, os_errors, regular, sha256, sync
from ..progress import Say
from .ranks import full, like

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_ASIDE = ".old"  # ends the name of a checkpoint that a new one replaces


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


def gather(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict, dict]:
    """(parameters by name, optimizer state by "name|key"), whole tensors; all ranks together."""
    names = {id(p): name for name, p in model.named_parameters()}
    moments = {
        f"{names[id(p)]}|{key}": full(torch.as_tensor(value)).contiguous()
        for group in optimizer.param_groups
        for p in group["params"]
        for key, value in optimizer.state.get(p, {}).items()
    }
    return {name: full(p.detach()).contiguous() for name, p in model.named_parameters()}, moments


def save(
    folder: Path, step: int, tensors: tuple[dict, dict], state: dict, keep: int, mine: set[str]
) -> dict:
    """Write `folder`/step-N from a temporary sibling, synced and renamed, then drop old ones.

    tensors: what `gather` gave. state: JSON values; where state["best"] is of this step, its
    "best_weights" become these. mine: names of the checkpoints that the run wrote or went on from;
    this one is added, all others are another run's and go. The newest `keep` stay, and those that
    hold the weights of their best evaluations.

    Returns the state. A failure (a full disk, say) is an OSError and leaves all as it was.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        sums = {}
        for file, values in zip((MODEL, OPTIMIZER), tensors, strict=True):
            with os_errors(temporary / file):
                save_file(values, temporary / file)
            sync(temporary / file)
            sums[file] = sha256(temporary / file)
        if state["best"] and state["best"]["step"] == step:
            state = state | {"best_weights": {"checkpoint": final.name, "sha256": sums[MODEL]}}
        body = {"step": step, "rng": rng_state(), **state}
        text = json_text({"sha256": sums, "state": body})
        digest = hashlib.sha256(text.encode()).hexdigest()
        with open(temporary / STATE, "w") as f:
            f.write(digest + "\n" + text)
            f.flush()
            os.fsync(f.fileno())
        sync(temporary)
        mine.add(final.name)
        _drop(folder, mine)  # first, lest a kill leave two runs' side by side
        if final.exists():  # a step saved again: one of the two is there at any moment
            os.rename(final, folder / f".{final.name}{_ASIDE}")
        os.rename(temporary, final)
        sync(folder)
    except BaseException as e:
        shutil.rmtree(temporary, ignore_errors=True)
        _put_back(folder)
        if isinstance(e, OSError):
            left = [c.name for c in checkpoints(folder)] or ["nothing"]
            raise OSError(
                f"checkpoint {final} is not written ({e}); kept: {', '.join(left)}. The same "
                "command with --resume auto goes on from the last one"
            ) from e
        raise
    _put_back(folder)
    newest = checkpoints(folder)[-keep:]
    _drop(folder, {c.name for c in newest} | {_best(c) for c in newest})
    return state


def bring(source: Path, folder: Path) -> None:
    """A copy of another run's checkpoint in `folder`, whole or not at all."""
    final, temporary = folder / source.name, folder / f".{source.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(temporary, final)


def _put_back(folder):
    """What `save` moved aside, unless the new one has its place."""
    for aside in folder.glob(f".step-*{_ASIDE}"):
        final = folder / aside.name.removeprefix(".").removesuffix(_ASIDE)
        if final.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(aside, final)


def _drop(folder, kept):
    for old in checkpoints(folder):
        if old.name not in kept:
            shutil.rmtree(old, ignore_errors=True)


def _best(checkpoint) -> str | None:
    """The name of the checkpoint whose weights are the best at `checkpoint`."""
    try:
        weights = _body(checkpoint)["state"]["best_weights"]
    except (OSError, ValueError):
        return None
    return weights and weights["checkpoint"]


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(folder.glob("step-*"))


def _body(checkpoint):
    digest, _, text = regular(checkpoint / STATE).read_text().partition("\n")
    if hashlib.sha256(text.encode()).hexdigest() != digest:
        raise ValueError(f"{checkpoint / STATE} does not match its checksum")
    return json.loads(text)


def _check(path, expected):
    try:
        found = sha256(path)
    except OSError as e:
        raise ValueError(f"{path} can't be read: {e}") from None
    if found != expected:
        raise ValueError(f"{path} does not match its checksum")


def read_state(checkpoint: Path) -> dict:
    """The JSON state of a checkpoint whose every checksum holds; ValueError names what doesn't."""
    try:
        body = _body(checkpoint)
    except OSError as e:
        raise ValueError(f"{checkpoint} is no whole checkpoint: {e}") from None
    for file, expected in body["sha256"].items():
        _check(checkpoint / file, expected)
    if "best_weights" not in body["state"]:
        raise ValueError(f"{checkpoint} is of an older version of bertfast: give --resume no")
    return body["state"]


def check_best(checkpoint: Path, state: dict) -> None:
    """ValueError where the best weights so far, which another checkpoint holds, are lost."""
    best = state["best_weights"]
    if best and best["checkpoint"] != checkpoint.name:
        _check(checkpoint.parent / best["checkpoint"] / MODEL, best["sha256"])


def read_best(folder: Path, best_weights: dict) -> dict:
    """Parameters by name; ValueError where they are not what was saved."""
    path = folder / best_weights["checkpoint"] / MODEL
    _check(path, best_weights["sha256"])
    return load_file(path)


def latest(folder: Path, warn: Say) -> tuple[Path, dict] | None:
    """The newest whole checkpoint and its state; `warn` hears of each damaged one passed over.

    Raises ValueError where some are whole, yet of none the best weights so far.
    """
    _put_back(folder)
    lost = None
    for checkpoint in reversed(checkpoints(folder)):
        try:
            state = read_state(checkpoint)
        except ValueError as e:
            warn(f"{e}; trying the checkpoint before it")
            continue
        try:
            check_best(checkpoint, state)
            return checkpoint, state
        except ValueError as e:
            lost = lost or (checkpoint, e)
            warn(f"the best weights at {checkpoint.name}: {e}; trying the checkpoint before it")
    if lost:
        raise ValueError(
            f"the best weights so far are lost ({lost[1]}), those of all checkpoints in {folder}: "
            f"--resume {lost[0]} goes on without them, --resume no starts anew"
        )
    return None


def restore(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Parameters and optimizer state, in place."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, value in load_file(checkpoint / MODEL).items():
            parameters[key].copy_(like(value, parameters[key]))
    for key, value in load_file(checkpoint / OPTIMIZER).items():
        parameter, field = key.rsplit("|", 1)
        p = parameters[parameter]
        optimizer.state[p][field] = value.to(p.device) if field == "step" else like(value, p)
