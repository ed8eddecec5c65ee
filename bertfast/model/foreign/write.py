"""A safetensors file written tensor by tensor: no more than one is in memory."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .weights import Weight

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def save(path: Path, weights: "Mapping[str, Weight]", dtype: torch.dtype) -> None:
    """Write a file of `weights` by name, in their order, as tensors of `dtype`."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, weight in weights.items():
        end = at + weight.stored.size * dtype.itemsize
        shape = list(weight.shape)
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data start aligned
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for weight in weights.values():
            f.write(weight.read().to(dtype).contiguous().reshape(-1).view(torch.uint8).numpy())
