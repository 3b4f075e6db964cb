"""Messages on the wire: 0x0a | varint frame length | frame, which is how protobuf spells `bytes frame = 1`.

A frame is magic | u32 header length, little endian | msgpack header | raw bytes. Writing costs one
copy of the payload and reading none; protobuf would add two on each side of every hop. The header is
one flat map of scalars in the one encoding that `encode` itself writes, so nesting, duplicate keys,
extension types, over-long numbers and trailing bytes are all refused by the same few lines. Knows
nothing of what may follow what.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, TypeVar

import msgpack

from kvstore.key import Buffer, malformed, require
from kvstore.records import ChunkHeader, ObjectHeader, Placed, Record, Seal

R = TypeVar("R", ObjectHeader, ChunkHeader, Seal)
MAGIC = b"TKV\x01"
VERSION = 2
MAX_HEADER_BYTES = 1024
TAG = b"\x0a"  # field 1, length-delimited
PREFIX = struct.Struct("<4sI")
MAX_PREFIX = 6  # bytes of the tag and the length

_KINDS: dict[str, type[Record]] = {
    "header": ObjectHeader,
    "chunk": ChunkHeader,
    "seal": Seal,
    "placed": Placed,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}
_TYPES = {"int": int, "str": str, "bytes": bytes}
_SCHEMAS = {
    kind: {"v": int, "kind": str} | {field.name: _TYPES[str(field.type)] for field in fields(kind)}
    for kind in _NAMES
}
_FIELDS = {kind: tuple(schema)[2:] for kind, schema in _SCHEMAS.items()}
_SHAPES = {_NAMES[kind]: (kind, list(schema), list(schema.values())) for kind, schema in _SCHEMAS.items()}
_LIMITS: dict[str, Any] = {
    "raw": False,
    "strict_map_key": True,
    "max_str_len": 512,  # a tenant of 128 characters is at most 512 bytes
    "max_bin_len": 64,
    "max_array_len": 0,
    "max_map_len": 24,
    "max_ext_len": 0,
}


def expect(kind: type[R], record: Record) -> R:
    """The record, which must be of this kind here."""
    if not isinstance(record, kind):
        raise malformed()
    return record


def encode(record: Record, payload: Buffer = b"") -> bytes:
    """A PutKvRequest or GetKvResponse, in one copy."""
    return head_of(record, memoryview(payload).nbytes) + payload


def head_of(record: Record, payload_bytes: int = 0) -> bytes:
    """What comes before the payload."""
    header = _pack(record)
    length = PREFIX.size + len(header) + payload_bytes
    return b"".join((TAG, _varint(length), PREFIX.pack(MAGIC, len(header)), header))


def split(messages: memoryview) -> Iterator[memoryview]:
    """Messages that lie one behind the other; BAD_MESSAGE at the first that is not whole."""
    while messages:
        end = _frame_in(messages).stop
        yield messages[:end]  # one that is cut short has another length than it says
        messages = messages[end:]


def decode(message: Buffer) -> tuple[Record, memoryview]:
    """The record in a message and a view of the payload behind it, or BAD_MESSAGE."""
    view = memoryview(message)
    frame = _frame_in(view)
    start = frame.start + PREFIX.size
    require(start <= frame.stop == len(view))
    magic, length = PREFIX.unpack_from(view, frame.start)
    require(magic == MAGIC and 0 < length <= MAX_HEADER_BYTES and start + length <= frame.stop)
    record, payload = _unpack(view[start : start + length]), view[start + length :]
    require(len(payload) == (record.length if isinstance(record, ChunkHeader) else 0))
    return record, payload


def reaches(message: Buffer, first_block: int) -> bool:
    """Whether a message is no chunk, or a chunk with a block from that one on."""
    if not first_block:
        return True
    record, _ = decode(message)
    return not isinstance(record, ChunkHeader) or record.block_start + record.num_blocks > first_block


def _varint(value: int) -> bytes:
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)


def _frame_in(message: memoryview) -> slice:
    """Where the frame of the message that begins here should be: behind the tag and a length without needless
    digits."""
    require(message[:1] == TAG)
    length = shift = 0
    for start, byte in enumerate(message[1:MAX_PREFIX], 2):
        length |= (byte & 0x7F) << shift
        if byte < 0x80:
            require(byte > 0)
            return slice(start, start + length)
        shift += 7
    raise malformed()


def _pack(record: Record) -> bytes:
    kind = type(record)
    values = {name: getattr(record, name) for name in _FIELDS[kind]}
    packed: bytes = msgpack.packb({"v": VERSION, "kind": _NAMES[kind], **values})
    return packed


def _unpack(header: memoryview) -> Record:
    try:
        values = msgpack.unpackb(header, **_LIMITS)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise malformed() from error
    require(type(values) is dict and values.get("v") == VERSION and type(values.get("kind")) is str)
    require(values["kind"] in _SHAPES)
    kind, names, types = _SHAPES[values["kind"]]
    require(list(values) == names and list(map(type, values.values())) == types)
    require(msgpack.packb(values) == header)  # one record, one encoding
    del values["v"], values["kind"]
    return kind(**values)
