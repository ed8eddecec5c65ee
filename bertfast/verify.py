"""Hashes of the files that a run read and left, and whether these still are what they were.

Whoever can change a file can change the manifest beside it: its own hash, which `verify` tells, is
to be kept elsewhere.
"""

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from . import __version__
from .files import StrPath, json_text, read_json, regular, sha256, write_text
from .saved import MANIFEST as FROZEN
from .saved import has_modules, recorded

MANIFEST = "manifest.json"
_FORMAT = 1
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack", ".onnx"}
READ = {"config.json", "vocab.txt", "tokenizer.json", "tokenizer_config.json", "decision.json"}
READ |= {"special_tokens_map.json", "added_tokens.json", "generation_config.json"}
READ |= {"model.safetensors.index.json", "pytorch_model.bin.index.json", "adapter_config.json"}


class Bad(NamedTuple):
    """A file that isn't what was recorded; a hash is None where there is no such file."""

    path: str
    expected: str | None
    found: str | None

    def __str__(self) -> str:
        expected = self.expected or "no such file"
        return f"{self.path}: expected {expected}, found {self.found or 'no file'}"


class Verdict(NamedTuple):
    """What `verify` finds."""

    bad: list[Bad]
    checked: list[str]  # paths of what was compared
    unknown: list[str]  # files in the folder that no hash is recorded of; inputs that are gone
    manifests: dict[str, str]  # the hash of each file that holds hashes


def entry(role: str, path: StrPath, digest: str | None = None) -> dict:
    """An input of a run, for `write`: what it is there, and its file. digest: where it is known."""
    return {"role": role, "path": os.path.abspath(path), "sha256": digest or sha256(path)}


def write(folder: Path, names: Iterable[str], inputs: Iterable[Any] = ()) -> None:
    """manifest.json, of those of the files `names` that are there and of `inputs`, see `entry`."""
    there = sorted(name for name in {*names} - {MANIFEST} if (folder / name).is_file())
    files = {
        name: {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size}
        for name in there
    }
    value = {"format": _FORMAT, "bertfast": __version__, "inputs": [*inputs], "files": files}
    write_text(folder / MANIFEST, json_text(value, indent=2) + "\n")


def read(folder: Path) -> dict | None:
    """What `write` wrote; None where it wrote nothing. Raises OSError, ValueError."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    found = read_json(path)
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise ValueError(f"{path} is none of bertfast, or of another version: nothing was checked")
    try:
        names = {name: one["sha256"] for name, one in found["files"].items()}
        entries = [(one["role"], one["path"], one["sha256"]) for one in found["inputs"]]
        whole = all(isinstance(v, str) for v in [*names.values(), *(v for e in entries for v in e)])
    except (AttributeError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"{path} is damaged: expected files and inputs with their hashes")
    return found


def verify(folder: StrPath, inputs: bool = False) -> Verdict:
    """Compare the files of a run, or of a frozen model, with the hashes recorded of them.

    A file that changed or is gone is bad, and one of weights, of a tokenizer or a configuration
    that was added: who loads the folder might take it. Of frozen models without manifest.json only
    weights beside theirs are.

    inputs: whether to compare the run's input files too, where they still are.

    Raises: OSError, FileNotFoundError for a folder without hashes; ValueError for damaged ones.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: give that of a run or of a frozen model")
    made, frozen = read(folder), recorded(folder)
    if made is None and not frozen:
        raise FileNotFoundError(
            f"{folder} has neither {MANIFEST} nor {FROZEN}: the run has not ended, or was of an "
            "older bertfast, or the folder is of something else; nothing was checked"
        )
    sums = {name: one["sha256"] for name, one in made["files"].items()} if made else {}
    sums |= frozen
    bad, unknown, beside = [], [], {PurePosixPath(name).parent for name in frozen}
    for name, expected in sorted(sums.items()):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{folder / MANIFEST} names {name!r}, outside its folder: refused")
        _compare(folder / name, name, expected, bad)
    for name in _files(folder):
        path = folder / name
        if name in sums or path.name in (MANIFEST, FROZEN):
            continue
        # Beside a frozen model's own files others may save what they have: a tokenizer, a module.
        near = made is not None or PurePosixPath(name).parent in beside
        if near and (path.suffix in WEIGHTS or (made is not None and path.name in READ)):
            bad.append(Bad(name, None, sha256(path)))
        else:
            unknown.append(name)
    checked = [*sums]
    for one in made["inputs"] if inputs and made else ():
        if Path(one["path"]).exists():
            _compare(Path(one["path"]), one["path"], one["sha256"], bad)
            checked.append(one["path"])
        else:
            unknown.append(one["path"])
    if inputs and not (made and made["inputs"]):
        raise ValueError(f"{folder} has no record of inputs: check it without --inputs")
    manifests = [name for name in _files(folder) if Path(name).name in (MANIFEST, FROZEN)]
    return Verdict(bad, checked, unknown, {name: sha256(folder / name) for name in manifests})


def _compare(path: Path, name: str, expected: str, bad: list) -> None:
    found = sha256(regular(path)) if path.exists() else None
    if found != expected:
        bad.append(Bad(name, expected, found))


def _files(folder: Path) -> list[str]:
    """Those in a folder, and below it where it is of sentence-transformers' modules."""
    paths = folder.rglob("*") if has_modules(folder) else folder.iterdir()
    names = (p.relative_to(folder).as_posix() for p in paths if p.is_file())
    return sorted(name for name in names if not any(n.startswith(".") for n in name.split("/")))


def write_rest(folder: Path) -> None:
    """manifest.json of all files in a folder of a frozen model of which nothing is recorded yet."""
    known = recorded(folder)
    write(folder, [n for n in _files(folder) if n not in known and Path(n).name != FROZEN])
