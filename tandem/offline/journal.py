"""A file that only grows, by whole sealed records that are on disk before anybody hears of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from tandem.errors import ConfigError, TandemError
from tandem.offline.record import is_sealed


class StorageError(TandemError):
    """The disk did not take a record. What was acknowledged before is safe; the queue can be resumed."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(
            "STORAGE", f"cannot write {path}: {error.strerror}; make room there, then resume the queue"
        )


class Journal:
    """One results file, for the one process that holds the queue's lock.

    Opening it repairs it: a torn tail is cut off; lines damaged in the middle are moved to `*.damaged`, so
    that what they were the results of is done again. Raises `ConfigError` if it cannot be opened.
    """

    def __init__(self, path: Path, on_record: Callable[[bytes], None] = lambda sealed: None) -> None:
        self.path = path
        self.num_dropped = 0  # lines that were no whole records
        self._end = self._repair(on_record)
        self._fd = _open(path)
        fsync_folder(path)

    def append(self, records: Sequence[bytes]) -> None:
        """Write all records at once and wait for the disk. Raises `StorageError`, then none is there."""
        data = b"".join(records)
        try:
            if (written := os.write(self._fd, data)) < len(data):  # a disk that is full takes a part
                os.write(self._fd, data[written:])
            os.fsync(self._fd)
        except OSError as error:
            os.ftruncate(self._fd, self._end)
            raise StorageError(self.path, error) from error
        self._end += len(data)

    def close(self) -> None:
        os.close(self._fd)

    def _repair(self, on_record: Callable[[bytes], None]) -> int:
        """Offset behind the last whole record, once nothing else is left before or behind it."""
        end = num_damaged = num_torn = 0
        fd = _open(self.path)
        with os.fdopen(fd, "rb", closefd=False) as file:
            for data in file:
                if is_sealed(data):
                    on_record(data)
                    end, num_damaged, num_torn = file.tell(), num_damaged + num_torn, 0
                else:
                    num_torn += 1
        os.ftruncate(fd, end)
        os.fsync(fd)
        os.close(fd)
        self.num_dropped = num_damaged + num_torn
        return self._without_damage() if num_damaged else end

    def _without_damage(self) -> int:
        rest = self.path.with_name(self.path.name + ".rewrite")
        damaged = self.path.with_name(self.path.name + ".damaged")
        with self.path.open("rb") as old, _create(rest) as kept, damaged.open("ab") as lost:
            for data in old:
                (kept if is_sealed(data) else lost).write(data)
            for file in (kept, lost):
                file.flush()
                os.fsync(file.fileno())
            end = kept.tell()
        rest.replace(self.path)
        fsync_folder(self.path)
        return end


def sealed_records(path: Path) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of the whole records in a file that another process may be writing."""
    if path.exists():
        with path.open("rb") as file:
            offset = 0
            for data in file:
                if is_sealed(data):
                    yield offset, data
                offset += len(data)


def replace_file(path: Path, text: str) -> None:
    """Put a new text in the place of a file as a whole; it is on disk before anybody sees it."""
    fresh = path.with_name(path.name + ".new")
    with _create(fresh) as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    fsync_folder(path)


def fsync_folder(path: Path) -> None:
    """Put a file's name on disk, too."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _create(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb")


def _open(path: Path) -> int:
    """For reading and appending, never through a link. Raises `ConfigError`."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        why = "it is a symbolic link" if path.is_symlink() else error.strerror
        raise ConfigError(f"cannot write {path}: {why}") from error
