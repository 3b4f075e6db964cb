"""One line of a results file: a JSON object that carries its own checksum.

    {"line":7, … ,"crc32":"89abcdef"}

The checksum is CRC-32 of the same object without its last member. Anybody can read the line as JSON, and
a line that was torn by a crash, or changed by hand, can be told from one that was not.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

_HEAD = b'{"line":'
_SEAL = b',"crc32":"%08x"}\n'
_SEAL_BYTES = len(_SEAL % 0)


def seal(line: int, members: dict[str, Any]) -> bytes:
    """The record of the input's line `line`, ended by a newline. All bytes are ASCII."""
    body = json.dumps({"line": line, **members}, separators=(",", ":")).encode()
    return body[:-1] + _SEAL % zlib.crc32(body)


def is_sealed(data: bytes) -> bool:
    """Whether these bytes are one whole record, as it was written."""
    body = data[:-_SEAL_BYTES] + b"}"
    return data.startswith(_HEAD) and data[-_SEAL_BYTES:] == _SEAL % zlib.crc32(body)


def line_of(sealed: bytes) -> int:
    """Which line of the input a whole record is of, without parsing the rest."""
    return int(sealed[len(_HEAD) : sealed.index(b",", len(_HEAD))])


def parse(sealed: bytes) -> dict[str, Any]:
    """The members of a whole record, without its checksum."""
    members: dict[str, Any] = json.loads(sealed)
    del members["crc32"]
    return members
