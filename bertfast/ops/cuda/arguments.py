"""What the operators here share."""

from typing import Any

import torch

from ..library import GPU_DTYPES, ptr

HALVES = (torch.bfloat16, torch.float16)
MAX_HIDDEN = 4096  # kMaxHidden in csrc/cuda/rows.h: a row stays in a block's registers


def hidden_limit(arguments: tuple[Any, ...]) -> str | None:
    """Why layer norm can't serve these; the first vector of floats among them is its weight."""
    tensors = (a for a in arguments if isinstance(a, torch.Tensor))
    weight = next((a for a in tensors if a.dim() == 1 and a.is_floating_point()), None)
    if weight is None or weight.shape[0] <= MAX_HIDDEN:
        return None
    return f"hidden is {weight.shape[0]}, it takes at most {MAX_HIDDEN}"


def dtype_code(t: torch.Tensor) -> int:
    return GPU_DTYPES.index(t.dtype)  # csrc/cuda/kernels.h has the same order


def parameter(t: torch.Tensor | None) -> tuple[int, bool]:
    """Pointer of an optional parameter vector, and whether it is fp32."""
    return ptr(t), t is not None and t.dtype == torch.float32


def row_blocks(rows: int) -> int:
    """Thread blocks that share out a sum over rows: by the rows alone, so its bits never change."""
    return min(-(-rows // 8), 1056)  # 8 for each multiprocessor of an H200
