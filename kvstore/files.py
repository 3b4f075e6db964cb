"""One file per object in a folder that dies with its process.

Stored KV does not outlive its store (handles name one life of it), so nothing is synced, and what a
killed process left behind is removed by the next one: each keeps a lock on its folder that the kernel
gives up for it. Names are random and nobody is told one before its object is complete; only the owner
can read the files.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from kvstore.backend import Location
from kvstore.key import ObjectKey
from tandem.errors import ConfigError, FailedPrecondition, Overloaded, Unavailable

log = logging.getLogger(__name__)

PREFIX = "tandem-kv-"
LOCK = ".lock"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(slots=True)
class File:
    """Where an object's messages are."""

    path: Path
    ends: list[int] = field(default_factory=list)  # offsets behind each message
    is_reused: bool = False  # for other objects later

    @property
    def size(self) -> int:
        """Bytes of all messages."""
        return self.ends[-1] if self.ends else 0


class FileBackend:
    """Messages one behind the other in a file per object, below `root`."""

    def __init__(self, root: Path, *, is_blocking: bool) -> None:
        """Raises `ConfigError` if the folder cannot be made. Leftovers of dead processes go first."""
        self.is_blocking = is_blocking
        self._files: dict[ObjectKey, File] = {}
        self._is_bad = False
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            remove_leftovers(root)
            self._folder, self._lock = _locked_folder(root)
        except OSError as error:
            raise ConfigError(f"cannot keep KV in {root}: {error.strerror}") from error

    def put(self, key: ObjectKey, index: int, message: bytes) -> None:
        """A medium that failed to write is bad from then on: nothing more is put there, and what it has is
        believed as far as its digests hold."""
        if self._is_bad:
            raise Unavailable("STORE_DOWN", "KV store is unavailable")
        try:
            with medium_errors():
                self._append(key, index, message)
        except Unavailable as error:
            self._is_bad = True
            log.error("no more KV is put into %s: %s", self._folder.parent, error.__cause__)
            raise

    def get(self, key: ObjectKey, index: int) -> bytes:
        file = self._files[key]
        start, end = (file.ends[index - 1] if index else 0), file.ends[index]
        with medium_errors(), _opened(file.path, os.O_RDONLY) as descriptor:
            message = os.pread(descriptor, end - start, start)
        if len(message) != end - start:
            raise _lost()
        return message

    def locate(self, key: ObjectKey) -> Location:
        file = self._files[key]
        return Location(str(file.path), tuple(file.ends), file.is_reused)

    def path(self, key: ObjectKey) -> Path:
        return self._files[key].path

    def delete(self, key: ObjectKey) -> None:
        file = self._files.pop(key, None)
        if file is not None:
            with suppress(OSError):
                file.path.unlink()

    def close(self) -> None:
        self._files.clear()
        shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._lock)

    def _append(self, key: ObjectKey, index: int, message: bytes) -> None:
        file = self._files.get(key) or self._create(key)
        assert index == len(file.ends), (index, len(file.ends))
        with _opened(file.path, os.O_WRONLY) as descriptor:
            _write(descriptor, message, file.size)
        file.ends.append(file.size + len(message))

    def _create(self, key: ObjectKey) -> File:
        path = self._folder / secrets.token_hex(16)
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        self._files[key] = File(path)
        return self._files[key]


def _locked_folder(root: Path) -> tuple[Path, int]:
    """A new folder and its lock, held before the folder has the name that others look for."""
    token = secrets.token_hex(16)
    unnamed, folder = root / f".{PREFIX}{token}", root / f"{PREFIX}{token}"
    unnamed.mkdir(mode=0o700)
    lock = os.open(unnamed / LOCK, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return unnamed.rename(folder), lock


def remove_leftovers(root: Path) -> int:
    """Remove the folders of processes that are gone; returns how many."""
    num_removed = 0
    for folder in root.glob(f"{PREFIX}*"):
        with suppress(OSError), _opened(folder / LOCK, os.O_RDWR) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
            num_removed += 1
    return num_removed


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write(descriptor: int, message: bytes, start: int) -> None:
    """All of the message; a write may stop short where space or a signal ends it."""
    rest = memoryview(message)
    while rest:
        num_written = os.pwrite(descriptor, rest, start)
        rest, start = rest[num_written:], start + num_written


@contextmanager
def medium_errors() -> Iterator[None]:
    """What the system says of files leaves as the store's own errors."""
    try:
        yield
    except FileNotFoundError as error:
        raise _lost() from error
    except OSError as error:
        if error.errno in _FULL:
            raise Overloaded("NO_MEMORY_FIT_NOW", "the store's medium is full") from error
        raise Unavailable("STORE_DOWN", "KV store is unavailable") from error


def _lost() -> FailedPrecondition:
    return FailedPrecondition("STALE_HANDLE", "the store has lost the object")
