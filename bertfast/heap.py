"""What glibc's allocator does with freed memory; without glibc these do nothing."""

import ctypes
from contextlib import suppress

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_MISSING = (AttributeError, OSError, TypeError)  # another C library


def release_freed() -> None:
    """Gives the system what was freed: glibc keeps blocks that lie below others (after
    `freeze`, BERT-base: 118 MB)."""
    with suppress(*_MISSING):
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed() -> None:
    """Keeps freed memory for the next allocation. A training step frees its gradients and
    activations; fresh pages for the next step's cost 5 to 10% of a step (BERT-base, 8 x 128: 40,000
    page faults). `release_freed` afterwards gives the system what is free by then."""
    with suppress(*_MISSING):
        libc = ctypes.CDLL(None)
        # Older ones take no more than 32 MB.
        if libc.mallopt(_MMAP_THRESHOLD, 1 << 30) or libc.mallopt(_MMAP_THRESHOLD, 1 << 25):
            libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
