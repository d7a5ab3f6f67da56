"""Memory of a training process."""

from __future__ import annotations

import ctypes
import sys

# glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let the allocator keep what a step frees for the next step; whether the C library could be told so.

    By default glibc gives large blocks back to the system at once, and every step faults their pages in again, which
    is a good part of the time of a small model on a CPU.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    # A threshold for blocks of their own would end at 32 MiB, which the gradient of an embedding table exceeds.
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
