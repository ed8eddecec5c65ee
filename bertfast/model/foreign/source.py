"""Where a checkpoint of another framework is, and what reads it."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...files import StrPath, regular
from ..errors import CheckpointError, unreadable
from . import flax, keras, names, tensorflow

_KINDS = "bert_model.ckpt.index of TensorFlow, flax_model.msgpack of Flax or tf_model.h5 of Keras"
_PICKLES = b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04"


@dataclass(frozen=True)
class Source:
    """A checkpoint: its file (TensorFlow's without .index), its reader, and its names' meaning."""

    format: str
    path: Path
    read: Callable
    rename: Callable
    configs: tuple[str, ...]  # names of its configuration
    model_type: str | None  # where the configuration doesn't say it

    @property
    def folder(self) -> Path:
        return self.path.parent


def find(given: StrPath) -> Source:
    """Of a folder, or of a file in it; of TensorFlow's also the prefix. Raises CheckpointError."""
    path = Path(given)
    with unreadable(f"{str(given)!r:.200} is no name of a file or folder"):
        if path.is_dir():
            return _in_folder(path)
        prefix = Path(re.sub(r"\.(index|data-\d{5}-of-\d{5})$", "", str(path)))
        if Path(f"{prefix}{tensorflow.INDEX}").exists():
            return _tensorflow(prefix)
        if prefix != path and path.exists():
            raise CheckpointError(
                f"{prefix}{tensorflow.INDEX} is not there, beside {path.name}: put it there"
            )
        if not path.exists():
            raise CheckpointError(f"{path} is not there: give a folder or file with {_KINDS}")
        _refuse(regular(path))
        return _keras(path) if _start(path) == keras.MAGIC else _flax(path)


def _tensorflow(prefix) -> Source:
    configs = "bert_config.json", "config.json"
    return Source("TensorFlow", prefix, tensorflow.read, names.google, configs, "bert")


def _flax(path) -> Source:
    return Source("Flax", path, flax.read, names.flax, ("config.json",), None)


def _keras(path) -> Source:
    return Source("Keras", path, keras.read, names.keras, ("config.json",), None)


def _in_folder(folder) -> Source:
    found = [_tensorflow(p.with_suffix("")) for p in sorted(folder.glob(f"*{tensorflow.INDEX}"))]
    latest = len(found) > 1 and _latest(folder)
    found = [s for s in found if s.path.name == latest] or found
    if (folder / flax.FILE).exists():
        found.append(_flax(folder / flax.FILE))
    if (folder / keras.FILE).exists():
        found.append(_keras(folder / keras.FILE))
    if len(found) > 1:
        some = ", ".join(s.path.name for s in found[:5])
        raise CheckpointError(f"{folder} holds several checkpoints, {some}: give the path of one")
    if not found:
        there = sorted(p for p in folder.iterdir() if p.is_file())
        for path in there:
            _refuse(path)
        listed = ", ".join(p.name for p in there[:5]) or "no files"
        raise CheckpointError(f"{folder} holds {listed}: expected {_KINDS}")
    return found[0]


def _latest(folder) -> str | None:
    """The checkpoint that TensorFlow's own file `checkpoint` names, the last one of a run."""
    path = folder / "checkpoint"
    text = regular(path).read_text(errors="replace") if path.exists() else ""
    said = re.search(r'^model_checkpoint_path: "(.*)"', text, re.MULTILINE)
    return Path(said[1]).name if said else None


def _start(path) -> bytes:
    with open(path, "rb") as f:
        return f.read(len(keras.MAGIC))


def _refuse(path) -> None:
    """CheckpointError for a file of a format that others read."""
    if tensorflow.is_table(path):
        raise CheckpointError(
            f"{path} is a TensorFlow checkpoint of format V1, one file without .index: save it as "
            "V2 with TensorFlow (tf.compat.v1.train.Saver's write_version)"
        )
    if _start(path).startswith(_PICKLES) or path.suffix == ".safetensors":
        raise CheckpointError(
            f"{path} is a pickle, a zip or safetensors, as PyTorch's weights are: if they are, "
            "from_pretrained reads their folder as it is (a pickle with allow_pickle=True)"
        )
