"""`shm://`: shared memory. Processes of this host map an object where it lies; others get its bytes.

POSIX shared memory is files in /dev/shm, which `shm_open` does no more than name.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from kvstore.backend import options_of
from kvstore.files import FileBackend
from tandem.errors import ConfigError

SHARED_MEMORY = Path("/dev/shm")


def open_backend(url: str) -> FileBackend:
    parts = urlsplit(url)
    options_of(parts)
    if parts.netloc or parts.path.strip("/"):
        raise ConfigError(f"shm:// takes no host and no path, not {url!r}")
    if not SHARED_MEMORY.is_dir():
        raise ConfigError("shm:// needs POSIX shared memory in /dev/shm; use memory:// or disk:// here")
    return FileBackend(SHARED_MEMORY, is_blocking=False)
