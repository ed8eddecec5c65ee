"""What `prepare` keeps on disk between its stages."""

from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_whole


def batch_file(work: Path, i: int) -> Path:
    return work / f"clean-{i:06d}.npz"


def read_batch(work: Path, i: int, name: str) -> np.ndarray:
    with np.load(batch_file(work, i)) as f:
        return f[name]


def save_arrays(target: Path, values: Any) -> None:
    """One array, or a dict of them, in a file."""

    def write(temporary):
        with open(temporary, "wb") as f:
            np.savez(f, **values) if isinstance(values, dict) else np.save(f, values)

    write_whole(target, write)
