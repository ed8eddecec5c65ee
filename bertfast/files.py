"""Files written whole or not at all, and folders that one run has for itself."""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

try:
    import fcntl
except ImportError:  # no POSIX: nothing is locked
    fcntl = None

StrPath: TypeAlias = str | os.PathLike[str]

_held = set()  # handles of locks, which a forked worker must not keep after this process


def _forget():
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextmanager
def locked(folder: Path, option: str = "--out") -> Iterator[None]:
    """`folder`, made where it isn't there, for this process alone; a killed process holds nothing.

    Raises BlockingIOError where another run has it; `option` gives another.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    _held.add(handle)
    try:
        _lock(handle, folder, option)
        yield
    finally:
        _held.discard(handle)
        os.close(handle)


def _lock(handle, folder, option):
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(handle, 32).decode(errors="replace").strip() or "unknown"
        raise BlockingIOError(
            f"{folder} is in use by another run (process {owner}): wait for it to end, stop it, or "
            f"give another {option}"
        ) from None
    except OSError:  # a file system without locks
        return
    os.ftruncate(handle, 0)
    os.write(handle, f"{os.getpid()}\n".encode())


def regular(path: StrPath) -> Path:
    """`path`, which is a file or a link to one. OSError for what would be waited for or read for
    ever (a pipe, a device), and for a folder."""
    path = Path(path)
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe or a device"
        raise OSError(f"{path} is {kind}, expected a file: give one in its place")
    return path


def sha256(path: StrPath) -> str:
    """A file's checksum. Raises OSError."""
    with open(regular(path), "rb") as f:
        digest = hashlib.sha256()
        while data := f.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def read_json(path: StrPath) -> Any:
    """The value in a JSON file. Raises OSError, and ValueError where it is no JSON."""
    try:
        return json.loads(regular(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError, MemoryError) as e:  # no UTF-8, numbers of 4301 digits, ...
        raise ValueError(f"{path} is no JSON: {e}") from None


def check_file(path: StrPath) -> None:
    """OSError where no file can be written at `path`: before the work whose result goes there."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected a file to write")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path} can't be written: its folder is not there; make it first")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise PermissionError(f"{path} can't be written: give another, or the right to")


def check_folder(folder: Path) -> None:
    """OSError where `folder` neither is a folder to write in nor could be made one."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{folder} can't be a folder: {there} is a file; give another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder}: nothing can be written in {there}; give another")


@contextmanager
def os_errors(path: StrPath) -> Iterator[None]:
    """A full disk as OSError also from safetensors and tokenizers, which raise their own kinds."""
    try:
        yield
    except OSError:
        raise
    except Exception as e:
        if "(os error " not in str(e):
            raise
        raise OSError(f"{path} can't be written: {e}") from None


def sync(path: StrPath) -> None:
    """A file, or the names in a folder, on disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, write: Callable[[str], object]) -> None:
    """`write(temporary path)`, then fsync and rename: `path` is the old file or the whole new."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    os.close(handle)
    try:
        with os_errors(path):
            write(temporary)
        sync(temporary)
        os.chmod(temporary, path.stat().st_mode & 0o777 if path.exists() else 0o644)
        put(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def put(temporary: StrPath, path: Path) -> None:
    """Rename a file that is on disk to `path`, for good."""
    os.replace(temporary, path)
    sync(path.parent)


def json_text(value: object, indent: int | None = None) -> str:
    """`value` as JSON that every reader takes: a number that is not finite is null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: StrPath, text: str) -> None:
    """UTF-8, whole or not at all; straight into what is no file (a pipe, a terminal), or is in a
    folder that takes no other."""
    path = Path(path)
    whole = path.is_file() and os.access(path.resolve().parent, os.W_OK)
    if path.exists() and not whole:
        path.write_text(text, encoding="utf-8")
    else:
        write_whole(
            path.resolve(), lambda temporary: Path(temporary).write_text(text, encoding="utf-8")
        )
