"""Flax's checkpoints: flax_model.msgpack, a tree of names with arrays as its leaves."""

import math
import mmap
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ...files import regular
from ..errors import CheckpointError, unreadable
from . import msgpack
from .stored import FLOATS, Stored, tensor

FILE = "flax_model.msgpack"
_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3  # Flax's own types of MessagePack
_CHUNKED = "__msgpack_chunked_array__"
_AGAIN = "take it anew from where it came from"


def read(path: Path) -> dict[str, Stored]:
    """The arrays of a file by their path, parts joined by /; they stay in the file until they are
    asked for. Raises CheckpointError."""
    with unreadable(f"{path} is damaged, truncated or no MessagePack ({_AGAIN})"):
        with open(regular(path), "rb") as f:
            data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        tree = msgpack.decode(data)
        if not isinstance(tree, dict) or not tree:
            raise ValueError(f"it holds a {type(tree).__name__}, expected names and arrays")
        if set(tree) == {"params"}:  # of a module's own variables
            tree = tree["params"]
        return dict(_leaves(tree, ""))


def _leaves(tree, before):
    for key, value in tree.items():
        name = f"{before}{key}"
        if isinstance(value, dict) and _CHUNKED not in value:
            yield from _leaves(value, f"{name}/")
        elif isinstance(value, dict):
            yield name, _chunked(name, value)
        elif isinstance(value, msgpack.Extension) and value.code in (_ARRAY, _SCALAR):
            dtype, shape, raw = _array(name, value)
            yield name, Stored(dtype, shape, partial(_read, [raw], dtype, shape))
        else:
            kind = "a complex number" if getattr(value, "code", 0) == _COMPLEX else repr(value)
            raise CheckpointError(f"{name} is {kind:.80}, expected an array")


def _array(name, value):
    """(dtype, shape, bytes) of an array as Flax packs it: in MessagePack, inside its own type."""
    found = msgpack.decode(value.data)
    if not isinstance(found, list) or len(found) != 3:
        raise ValueError(f"{name} is no shape, type and bytes")
    shape, dtype, raw = found
    dtype = dtype if isinstance(dtype, str) else bytes(dtype).decode()
    shape = _shape(name, shape)
    if dtype in FLOATS and len(raw) != math.prod(shape) * FLOATS[dtype].itemsize:
        raise ValueError(f"{name} has {len(raw):,} bytes for {dtype} {list(shape)}")
    return dtype, shape, raw


def _shape(name, found) -> tuple[int, ...]:
    if not isinstance(found, list) or not all(type(n) is int and n >= 0 for n in found):
        raise ValueError(f"{name} has the shape {found!r:.80}")
    return tuple(found)


def _chunked(name, value) -> Stored:
    """An array of more than 1 GB, in pieces: maps of "0", "1", ... in place of lists."""
    sizes, pieces = (
        [value[part][str(i)] for i in range(len(value[part]))] for part in ("shape", "chunks")
    )
    arrays = [_array(name, piece) for piece in pieces]
    shape, dtypes = _shape(name, sizes), {dtype for dtype, _, _ in arrays}
    count = sum(math.prod(size) for _, size, _ in arrays)
    if len(dtypes) != 1 or count != math.prod(shape):
        raise ValueError(f"{name} is {list(shape)}, its pieces have {count:,} numbers")
    dtype = dtypes.pop()
    return Stored(dtype, shape, partial(_read, [raw for _, _, raw in arrays], dtype, shape))


def _read(pieces, dtype, shape) -> torch.Tensor:
    raw = [np.frombuffer(piece, np.uint8) for piece in pieces]
    return tensor(np.concatenate(raw) if len(raw) > 1 else raw[0], dtype, shape)
