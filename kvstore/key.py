"""Names of objects: the key the store files them under, and the handle a reader brings.

Holds no address: where stores are is configuration.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from tandem.errors import InvalidRequest
from tandem.pb.kv.v1 import kv_pb2 as pb

OBJECT_ID_BYTES = 16
FINGERPRINT_BYTES = 32
MODELS = ("target", "draft")  # a request has at most one object of each

Buffer = bytes | bytearray | memoryview


def malformed() -> InvalidRequest:
    """What came over the wire is refused; the text never tells which byte was wrong."""
    return InvalidRequest("BAD_MESSAGE", "malformed request message")


def require(condition: bool) -> None:
    """Refuse what came over the wire unless the condition holds."""
    if not condition:
        raise malformed()


def object_id_of(tenant: str, request_id: str, model: str = "target") -> bytes:
    """The same 16 bytes for every attempt at a request, so that a later epoch fences an earlier writer.

    `model` is one of `MODELS`.
    """
    name = f"tandem.kv.v1|{len(tenant)}|{tenant}|{model}|{request_id}"
    return hashlib.sha256(name.encode()).digest()[:OBJECT_ID_BYTES]


class ObjectKey(NamedTuple):
    """One attempt at one object."""

    object_id: bytes
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KvHandle:
    """Names a sealed object for the decode side."""

    object_id: bytes
    epoch: int  # writer generation: a later attempt for the same request has a higher one
    store_epoch: int  # which life of the store wrote it
    num_bytes: int
    num_tokens: int
    fingerprint: bytes  # SHA-256 of what must match between writer and reader
    # The draft model's KV of the same tokens, where the writer computed it; no part of this object's name.
    draft: KvHandle | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        require(len(self.object_id) == OBJECT_ID_BYTES)
        require(len(self.fingerprint) == FINGERPRINT_BYTES)

    @property
    def key(self) -> ObjectKey:
        return ObjectKey(self.object_id, self.epoch)

    @property
    def objects(self) -> tuple[KvHandle, ...]:
        """Every object that the handle stands for, each to be given up by itself."""
        return (self,) if self.draft is None else (self, self.draft)

    def to_pb(self) -> pb.KvHandle:
        return pb.KvHandle(
            object_id=self.object_id,
            epoch=self.epoch,
            store_epoch=self.store_epoch,
            num_bytes=self.num_bytes,
            num_tokens=self.num_tokens,
            fingerprint=self.fingerprint,
            draft=self.draft.to_pb() if self.draft else None,
        )

    @classmethod
    def from_pb(cls, message: pb.KvHandle) -> Self:
        return cls(
            object_id=message.object_id,
            epoch=message.epoch,
            store_epoch=message.store_epoch,
            num_bytes=message.num_bytes,
            num_tokens=message.num_tokens,
            fingerprint=message.fingerprint,
            draft=cls.from_pb(message.draft) if message.HasField("draft") else None,
        )
