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


def ran_out(error: BaseException) -> str | None:
    """What to say of an error that means that memory ran out; None for any other error."""
    import torch

    said = str(error).splitlines()[0] if str(error) else ""
    on_device = isinstance(error, torch.OutOfMemoryError)
    if not (on_device or isinstance(error, MemoryError) or "can't allocate memory" in said):
        return None
    if on_device and torch.cuda.is_available():
        most, there = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(0).total_memory
        peak = f"{most / 1e9:.1f} of {there / 1e9:.1f} GB of the GPU"
    else:
        peak = f"{_peak() / 1e9:.1f} GB of this process"
    return (
        f"out of memory ({said or type(error).__name__}); at most {peak} were in use: halve data.loader.batch_size and"
        " double trainer.accumulate_grad_batches, set trainer.precision=bf16-mixed, or make the model smaller (dim)"
    )


def _peak() -> int:
    """Bytes of memory that this process has had at most."""
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
