"""Drop-in: `accelerate` makes a transformers or sentence-transformers model run on our kernels.

Importing this also registers `attn_implementation="bertfast"` with transformers.
"""

from .accelerate import AccelerationError, Report, accelerate, accelerated, is_accelerated, restore
from .attention import attention_forward

__all__ = [
    "AccelerationError",
    "Report",
    "accelerate",
    "accelerated",
    "attention_forward",
    "is_accelerated",
    "restore",
]
