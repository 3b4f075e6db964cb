"""Files that outlive the objects in them: the next object of about that size finds its pages there.

A fresh page costs a fault and its zeroing in every process that maps it, several times what copying into
it costs. Knows nothing of objects: who may still look at a file is the store's business.
"""

from __future__ import annotations

import os
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

KEEP_BYTES = 256 << 20  # of files that wait for their next object
PAGE_BYTES = 4096
STEPS = 4  # sizes in an octave


def size_class(num_bytes: int) -> int:
    """The next of four sizes per octave, in whole pages."""
    step = max(PAGE_BYTES, (1 << (num_bytes - 1).bit_length()) // (2 * STEPS))
    return -(-num_bytes // step) * step


class FreeSegments:
    """Files that wait, by size; those that waited longest go when there are too many."""

    def __init__(self, keep_bytes: int = KEEP_BYTES) -> None:
        self.num_bytes = 0
        self._keep_bytes = keep_bytes
        self._by_size: defaultdict[int, deque[Path]] = defaultdict(deque)  # longest waiting first
        self._sizes: OrderedDict[Path, int] = OrderedDict()

    def __iter__(self) -> Iterator[Path]:
        return iter(self._sizes)

    def take(self, num_bytes: int) -> Path | None:
        """The file of that size, or up to twice that, that was used last."""
        size = least = size_class(num_bytes)
        while size <= 2 * least:
            if self._by_size[size]:
                return self._take(self._by_size[size].pop())
            size = size_class(size + 1)
        return None

    def give(self, path: Path) -> None:
        """A file that nobody looks at any more. One whose size somebody changed is of no use."""
        size = os.stat(path).st_size
        if size != size_class(size):
            path.unlink()
            return
        self._by_size[size].append(path)
        self._sizes[path] = size
        self.num_bytes += size
        while self.num_bytes > self._keep_bytes:
            self.drop_oldest()

    def drop_oldest(self) -> bool:
        """Give memory back; False if there is none."""
        if not self._sizes:
            return False
        path = self._by_size[next(iter(self._sizes.values()))].popleft()
        with suppress(OSError):
            self._take(path).unlink()
        return True

    def _take(self, path: Path) -> Path:
        self.num_bytes -= self._sizes.pop(path)
        return path


def make_segment(path: Path, num_bytes: int) -> None:
    """A file of its class's size with memory for all of it. OSError leaves nothing behind."""
    size = size_class(num_bytes)
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(descriptor)
