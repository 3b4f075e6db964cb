"""Memory for weights in large pages: a forward walks all of them, and small pages cost a lookup each."""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch

CHUNK_BYTES = 32 << 20
ALIGNMENT = 64  # bytes: a cache line


class Arena:
    """Hands out tensors behind each other. Nothing is given back before the last of them is gone."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy that starts on a cache line."""
        size = tensor.numel() * tensor.element_size()
        if not size:
            return tensor.clone()
        if self._used + size > len(self._chunk):
            self._chunk, self._used = _pages(max(size, CHUNK_BYTES)), 0
        place = self._chunk[self._used : self._used + size]
        self._used += -(-size // ALIGNMENT) * ALIGNMENT
        copy = place.view(tensor.dtype).view(tensor.shape)
        copy.copy_(tensor)
        return copy


def _pages(size: int) -> torch.Tensor:
    pages = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without large pages: slower, not wrong
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)
