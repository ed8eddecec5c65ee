"""A tensor in a file of another framework."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """What a file says of a tensor; `read` reads and checks it.

    dtype: the name that it has there, for weights one of FLOATS.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def tensor(raw: np.ndarray, dtype: str, shape: Sequence[int]) -> torch.Tensor:
    """A copy, with memory of its own, of a file's bytes (uint8), as one of FLOATS."""
    made = torch.empty(math.prod(shape), dtype=FLOATS[dtype])
    made.view(torch.uint8).numpy()[:] = raw
    return made.reshape(shape)
