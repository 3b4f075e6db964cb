"""What a store holds, object by object, for whoever looks after it. Holds no payload and no prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvstore.books import Books
from kvstore.key import ObjectKey
from kvstore.objects import ObjectState
from tandem.pb.kv.v1 import kv_pb2 as pb


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object as an audit shows it."""

    key: ObjectKey
    state: ObjectState
    num_bytes: int
    holders: tuple[str, ...]  # of leases
    age_s: float  # since it was reserved
    is_prefix: bool

    def to_pb(self) -> pb.KvObjectInfo:
        return pb.KvObjectInfo(
            object_id=self.key.object_id,
            epoch=self.key.epoch,
            state=pb.KvState.Value(f"KV_STATE_{self.state.name}"),
            num_bytes=self.num_bytes,
            holders=self.holders,
            age_s=self.age_s,
            is_prefix=self.is_prefix,
        )

    @classmethod
    def from_pb(cls, message: pb.KvObjectInfo) -> ObjectInfo:
        state = pb.KvState.Name(message.state).removeprefix("KV_STATE_")
        return cls(
            ObjectKey(message.object_id, message.epoch),
            ObjectState[state],
            message.num_bytes,
            tuple(message.holders),
            message.age_s,
            message.is_prefix,
        )


def list_objects(books: Books) -> Iterator[ObjectInfo]:
    """All objects, the oldest of each budget first."""
    for audit in books.audits():
        for owned in audit.owners:
            obj = books.objects[ObjectKey(bytes.fromhex(owned.owner), owned.generation)]
            yield ObjectInfo(
                obj.key, obj.state, owned.amount, tuple(obj.leases), owned.age_s, bool(obj.header.is_prefix)
            )
