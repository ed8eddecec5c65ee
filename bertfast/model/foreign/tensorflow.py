"""TensorFlow's checkpoints ("bundles"): PREFIX.index, and PREFIX.data-00000-of-00001 or several."""

import math
from functools import partial
from pathlib import Path

import numpy as np

from ...files import regular
from ..errors import CheckpointError, unreadable
from . import table
from .binary import message
from .crc32c import masked
from .stored import FLOATS, Stored, tensor

INDEX = ".index"
_AGAIN = "take it anew from where it came from"
_TYPES = {1: "float32", 2: "float64", 3: "int32", 4: "uint8", 6: "int8", 7: "string", 9: "int64"}
_TYPES |= {10: "bool", 14: "bfloat16", 19: "float16"}
_OBJECTS = b"_CHECKPOINTABLE_OBJECT_GRAPH"


def is_table(path: Path) -> bool:
    """Whether a file is one, as all of TensorFlow's checkpoints of before 2017 are."""
    with open(path, "rb") as f:
        f.seek(max(0, path.stat().st_size - len(table.MAGIC)))
        return f.read() == table.MAGIC


def read(prefix: Path) -> dict[str, Stored]:
    """The tensors of a checkpoint by name; their bytes stay in the files until they are asked for.

    Raises CheckpointError for what is damaged, missing or kept in another way.
    """
    index = Path(f"{prefix}{INDEX}")
    with unreadable():
        data = regular(index).read_bytes()
    if data[-8:] != table.MAGIC:
        raise CheckpointError(
            f"{index} is no index of a TensorFlow checkpoint, or is truncated: it ends in "
            f"{data[-8:].hex() or 'nothing'}, expected {table.MAGIC.hex()}; {_AGAIN}"
        )
    with unreadable(f"{index} is damaged ({_AGAIN})"):
        entries = table.read(data)
        header = message(entries.pop(b"", b""))
        # A part of a variable has a name of other bytes than text.
        fields = {name.decode(errors="replace"): message(v) for name, v in entries.items()}
    if _OBJECTS in entries or any(".ATTRIBUTES/" in name for name in fields):
        raise CheckpointError(
            f"{index} is of TensorFlow 2's object graphs, where every program has its own names: "
            "give the checkpoint of TensorFlow 1 (tf.compat.v1.train.Saver), or a tf_model.h5"
        )
    if header.get(2, [0])[-1]:
        raise CheckpointError(f"{index} was written big-endian: save it on a little-endian machine")
    shards = _shards(prefix, header.get(1, [0])[-1])
    parts = [name for name, entry in fields.items() if 7 in entry]
    if parts:
        raise CheckpointError(
            f"{index}: {parts[0]} is kept in parts (a partitioned variable): save the model "
            "without a partitioner"
        )
    with unreadable(f"{index} is damaged ({_AGAIN})"):
        return {name: _stored(index, shards, name, entry) for name, entry in fields.items()}


def _shards(prefix: Path, count: int) -> list[np.ndarray]:
    """The data files, mapped."""
    paths = [Path(f"{prefix}.data-{i:05d}-of-{count:05d}") for i in range(min(count, 100_000))]
    missing = [path.name for path in paths if not path.exists()]
    if missing or not count:
        raise CheckpointError(
            f"{prefix.parent} lacks {', '.join(missing[:3]) or 'data files'}"
            f"{' and more' * (len(missing) > 3)}: {prefix.name}{INDEX} has its tensors in {count} "
            "files; put them all beside it"
        )
    with unreadable():
        # An empty file can't be mapped.
        return [
            np.memmap(regular(p), np.uint8, "r") if p.stat().st_size else np.zeros(0, np.uint8)
            for p in paths
        ]


def _stored(index, shards, name, entry) -> Stored:
    number = entry.get(1, [0])[-1]
    dtype = _TYPES.get(number, f"TensorFlow's type {number}")
    dims = message(entry.get(2, [b""])[-1]).get(2, [])
    shape = tuple(message(dim).get(1, [0])[-1] for dim in dims)
    shard, offset, size, crc = (entry.get(i, [0])[-1] for i in (3, 4, 5, 6))
    if shard >= len(shards):
        raise ValueError(f"{name} is in data file {shard} of {len(shards)}")
    place = shards[shard], offset, size, crc
    return Stored(dtype, shape, partial(_read, name, dtype, shape, *place))


def _read(name, dtype, shape, shard, offset, size, crc):
    path = getattr(shard, "filename", "the data file")
    if offset + size > len(shard):
        raise CheckpointError(
            f"{path} is truncated: {name} is in its bytes {offset:,} to {offset + size:,}, and it "
            f"has {len(shard):,}; {_AGAIN}"
        )
    raw = shard[offset : offset + size]
    if masked(raw) != crc:
        raise CheckpointError(f"{path} is damaged: the checksum of {name} is another; {_AGAIN}")
    wanted = math.prod(shape) * FLOATS[dtype].itemsize
    if size != wanted:
        raise CheckpointError(f"{path}: {name} has {size:,} bytes, expected {wanted:,}; {_AGAIN}")
    return tensor(raw, dtype, shape)
