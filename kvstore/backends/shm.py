"""`shm://`: shared memory. Processes of this host write and read an object where it lies; others send and get
its bytes.

POSIX shared memory is files in /dev/shm, which `shm_open` does no more than name. Files are used again
(kvstore/segments.py).
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from kvstore.files import File, FileBackend, medium_errors
from kvstore.key import ObjectKey, require
from kvstore.mapping import Mappings
from kvstore.segments import FreeSegments, make_segment
from tandem.errors import ConfigError
from tandem.redis_url import options_of

SHARED_MEMORY = Path("/dev/shm")


class ShmBackend(FileBackend):
    """A file per object that is placed, with memory for all of it from the beginning."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, is_blocking=True)  # allocating gigabytes takes a while
        self._free = FreeSegments()
        self._mapped = Mappings()

    def place(self, key: ObjectKey, num_bytes: int) -> None:
        with medium_errors():
            path = self._free.take(num_bytes) or self._make(num_bytes)
        self._files[key] = File(path, is_reused=True)

    def placed(self, key: ObjectKey, end: int) -> memoryview:
        file = self._files[key]
        mapped = self._mapped.view(str(file.path), end)
        require(mapped is not None)
        assert mapped is not None
        return mapped[file.size :]

    def accept(self, key: ObjectKey, num_bytes: int) -> None:
        file = self._files[key]
        file.ends.append(file.size + num_bytes)

    def recycle(self, key: ObjectKey) -> None:
        file = self._files.pop(key, None)
        if file is not None:
            with suppress(OSError):
                self._free.give(file.path)

    def close(self) -> None:
        self._mapped.clear()
        super().close()

    def _make(self, num_bytes: int) -> Path:
        path = self._folder / secrets.token_hex(16)
        while True:
            try:
                make_segment(path, num_bytes)
            except OSError:
                if not self._free.drop_oldest():
                    raise
            else:
                return path


def has_room(num_bytes: int) -> bool:
    """Whether this host has shared memory, with so many bytes free."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return False
    return found.f_bavail * found.f_frsize >= num_bytes


def open_backend(url: str) -> ShmBackend:
    parts = urlsplit(url)
    options_of(parts)
    if parts.netloc or parts.path.strip("/"):
        raise ConfigError(f"shm:// takes no host and no path, not {url!r}")
    if not SHARED_MEMORY.is_dir():
        raise ConfigError("shm:// needs POSIX shared memory in /dev/shm; use memory:// or disk:// here")
    return ShmBackend(SHARED_MEMORY)
