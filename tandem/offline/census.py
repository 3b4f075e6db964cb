"""The pass over the whole input before any work: how many lines, which are bad, are names unique?

Memory is eight bytes a line. Names are compared by a 64-bit hash first; only where two are equal is the
file read again for the names themselves.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tandem.errors import ConfigError
from tandem.offline.lines import BadLine, Check, LineParser, read_entries

MAX_EXAMPLES = 5  # of bad lines, for people


class DuplicateError(ConfigError):
    """A `custom_id` that occurs twice: which, and in which lines."""

    def __init__(self, path: Path, custom_id: str, first: int, line: int) -> None:
        self.line = line
        self.told = f"custom_id {custom_id[:64]!r} is that of line {first} too; make every custom_id unique"
        super().__init__(f"{path}:{line}: {self.told}")


@dataclass(frozen=True, slots=True)
class Census:
    """What a file holds. `bad` are the first few bad lines: line, column, what is wrong."""

    total: int
    num_bad: int
    bad: list[tuple[int, int, str]] = field(default_factory=list)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal. Raises `ConfigError` if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def take_census(path: Path, parser: LineParser, check: Check = lambda entry: None) -> Census:
    """Read and check every line. Raises `DuplicateError`."""
    hashes = array("Q")
    num_bad = 0
    bad: list[tuple[int, int, str]] = []
    for line, found in read_entries(path, parser, check):
        if isinstance(found, BadLine):
            num_bad += 1
            bad += [(line, found.column, found.message)] if len(bad) < MAX_EXAMPLES else []
        hashes.append(_hash(found.custom_id))
    repeated = _repeated(hashes)
    if repeated:
        _refuse_duplicates(path, parser, repeated)
    return Census(len(hashes), num_bad, bad)


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _repeated(hashes: array[int]) -> set[int]:
    if not hashes:
        return set()
    found = np.frombuffer(hashes, dtype=np.uint64)
    found.sort()
    return {int(value) for value in found[1:][found[1:] == found[:-1]]}


def _refuse_duplicates(path: Path, parser: LineParser, suspects: set[int]) -> None:
    first_line: dict[str, int] = {}
    for line, found in read_entries(path, parser):
        name = found.custom_id
        if _hash(name) not in suspects:
            continue
        if name in first_line:
            raise DuplicateError(path, name, first_line[name], line)
        first_line[name] = line
