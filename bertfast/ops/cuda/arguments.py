"""What the operators here share."""

import torch

from ..dropout import threshold
from ..library import GPU_DTYPES, ptr


def dtype_code(t):
    return GPU_DTYPES.index(t.dtype)  # csrc/cuda/kernels.h has the same order


def parameter(t):
    """Pointer of an optional parameter vector, and whether it is fp32."""
    return ptr(t), t is not None and t.dtype == torch.float32


def dropout(p, seed):
    return ptr(seed), 1 / (1 - p), threshold(p)


def row_blocks(rows):
    """Thread blocks that share out a sum over rows: by the rows alone, so its bits never change."""
    return min(-(-rows // 8), 264)
