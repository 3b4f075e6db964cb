"""How a process of the service keeps its memory: KV chunks are allocated and freed all the time, and what is
loaded stays."""

from __future__ import annotations

import ctypes
import gc
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST_KEPT, MOST_KEPT = 64 << 20, 1 << 30  # bytes, of one allocation and of all


def keep_pages() -> None:
    """Let this process use the pages of freed memory again instead of faulting new ones in.

    What the environment says of malloc goes before; another C library than glibc does as it likes.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and not any(name.startswith("MALLOC_") for name in os.environ):
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        libc.mallopt(M_TRIM_THRESHOLD, MOST_KEPT)


def keep_objects() -> None:
    """Let the garbage collector pass over all objects that are there now. A walk over what a worker has
    loaded for good takes a tenth of a second, and would stop its steps for so long."""
    gc.collect()
    gc.freeze()
