"""The C library's allocator: buffers of a training step are kept for the next one. Standard library only."""

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt (malloc.h)."""
KEPT_BYTES = 2**30
"""Largest buffer that is kept; larger ones are mapped each time. glibc's own limit adapts up to 32 MiB only."""


def keep_buffers() -> bool:
    """Let the allocator of this process keep freed buffers for later ones; return whether it does.

    PyTorch takes and frees the same large buffers in every step. By default glibc maps each above 32 MiB anew, and
    returns the end of its heap, so that the kernel clears their pages again and again: up to half of the processor
    time of wide networks (docs/results/LOG.md). Results do not change. An allocator that the user has tuned
    (MALLOC_..., GLIBC_TUNABLES) or replaced (LD_PRELOAD), or another C library, stays as it is.
    """
    tuned = any(name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD") for name in os.environ)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # no glibc
        return False
    if tuned:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, KEPT_BYTES) and mallopt(M_TRIM_THRESHOLD, 2 * KEPT_BYTES - 1))
