"""The weights of transformers' former TensorFlow 2 classes: tf_model.h5, by h5py."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ...files import regular
from ..errors import CheckpointError, unreadable
from .stored import Stored

FILE = "tf_model.h5"
MAGIC = b"\x89HDF\r\n\x1a\n"


def read(path: Path) -> dict[str, Stored]:
    """The variables of a file by their path in the model; what several layers share once.

    Raises CheckpointError, also where h5py is not installed.
    """
    try:
        import h5py
    except ImportError:
        raise CheckpointError(
            f"{path} is an HDF5 file, of Keras, which takes h5py to read: install it with pip "
            "install 'bertfast[convert]'"
        ) from None
    found, where = {}, {}

    def visit(name, item):
        if not isinstance(item, h5py.Dataset):
            return
        # LAYER/MODEL/..., and "___" stands for a scope, "_._" for a place in a list.
        own = name.split("/", 2)[-1].removesuffix(":0").replace("_._", "/")
        own = re.sub(r"(?<![^/])[^/]*___", "", own)
        if own in found and not np.array_equal(item[()], item.file[where[own]][()]):
            raise CheckpointError(f"{path}: {where[own]} and {name} are one variable, and differ")
        found[own] = Stored(str(item.dtype), item.shape, partial(_read, path, name))
        where.setdefault(own, name)

    fault = f"{path} is damaged, truncated or no HDF5 (take it anew)"
    with unreadable(fault), h5py.File(regular(path), "r") as f:
        f.visititems(visit)
    return found


def _read(path, name) -> torch.Tensor:
    import h5py

    with unreadable(f"{path} is damaged at {name} (take it anew)"), h5py.File(path, "r") as f:
        return torch.from_numpy(f[name][()])
