"""Drop-in: `accelerate` makes a transformers or sentence-transformers model run on our kernels."""

from .accelerate import AccelerationError, Report, accelerate, accelerated, is_accelerated, restore

__all__ = [
    "AccelerationError",
    "Report",
    "accelerate",
    "accelerated",
    "is_accelerated",
    "restore",
]
