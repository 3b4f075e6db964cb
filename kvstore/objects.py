"""One object in the store: where it is in its life, and who reads it.

    RESERVED ──► SEALED ◄──► LEASED
        │          │           │
        └──────────┴─────┬─────┘
                         ▼
                RELEASED | EXPIRED ──► FREED

`KvObject.to` is the only way a state changes. An object that was given up while somebody reads it is
RELEASED until the last lease ends. Knows nothing of bytes, clocks or sockets.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from kvstore.assembly import Assembly
from kvstore.backend import Use
from kvstore.key import KvHandle, ObjectKey
from kvstore.records import ObjectHeader, Seal


class ObjectState(Enum):
    """Only SEALED and LEASED can be leased; nothing else is ever read."""

    RESERVED = "reserved"  # bytes are charged, writing goes on
    SEALED = "sealed"  # complete and immutable
    LEASED = "leased"  # and somebody reads it
    RELEASED = "released"  # given up
    EXPIRED = "expired"  # nobody came in time
    FREED = "freed"  # the bytes are back in the pool


_ENDS = frozenset({ObjectState.RELEASED, ObjectState.EXPIRED})
TRANSITIONS: dict[ObjectState, frozenset[ObjectState]] = {
    ObjectState.RESERVED: frozenset({ObjectState.SEALED}) | _ENDS,
    ObjectState.SEALED: frozenset({ObjectState.LEASED}) | _ENDS,
    ObjectState.LEASED: frozenset({ObjectState.SEALED}) | _ENDS,
    ObjectState.RELEASED: frozenset({ObjectState.FREED}),
    ObjectState.EXPIRED: frozenset({ObjectState.FREED}),
    ObjectState.FREED: frozenset(),
}


@dataclass(frozen=True, slots=True, eq=False)
class Lease:
    """A holder's right to read. A new lease of the same holder is another one: the earlier is over."""

    handle: KvHandle
    holder: str

    @property
    def hold(self) -> str:
        return f"lease:{self.holder}"


@dataclass(slots=True, eq=False)
class KvObject:
    """What the store knows of one object."""

    header: ObjectHeader
    writer: str = ""  # the connection that reserved it
    state: ObjectState = ObjectState.RESERVED
    digests: list[bytes] = field(default_factory=list)  # of the chunks kept so far
    seal: Seal | None = None
    leases: dict[str, Lease] = field(default_factory=dict)  # by holder
    is_shared: bool = False  # a writer or a reader was told where its memory is
    has_lost_peer: bool = False  # a reader whose time ran out may still look there
    key: ObjectKey = field(init=False)

    def __post_init__(self) -> None:
        self.key = self.header.key

    @property
    def owner(self) -> str:
        return self.header.object_id.hex()

    @property
    def is_readable(self) -> bool:
        return self.state in (ObjectState.SEALED, ObjectState.LEASED)

    @property
    def use(self) -> Use:
        """Who of those that were let at its memory may look there."""
        if self.is_shared and (self.seal is None or self.leases):
            return Use.NOW
        return Use.LOST if self.is_shared and self.has_lost_peer else Use.NONE

    def is_prefix_of(self, fingerprint: bytes, tenant: str) -> bool:
        """Whether this is a prefix that the tenant's prompts for that model build may use now."""
        header = self.header
        is_theirs = header.fingerprint == fingerprint and header.tenant == tenant
        return bool(header.is_prefix) and is_theirs and self.is_readable

    def to(self, state: ObjectState) -> None:
        """Move to `state`; a move the table does not list is a bug and raises ValueError."""
        if state not in TRANSITIONS[self.state]:
            raise ValueError(f"illegal transition {self.state.name} → {state.name}")
        self.state = state


@dataclass(slots=True, eq=False)
class PutTicket:
    """A writer's right to write one object. `is_repeat`: the object is complete, and this writer is
    only checked against it."""

    object: KvObject
    assembly: Assembly
    is_repeat: bool = False


@dataclass(frozen=True, slots=True)
class ObjectStat:
    """What `stat` answers."""

    state: ObjectState
    num_bytes: int
    num_leases: int


@dataclass(slots=True)
class StoreCounters:
    """How often things happened since the store started."""

    reserved: int = 0
    sealed: int = 0
    sealed_fp16: int = 0  # of those, in a codec other than raw
    sealed_int8: int = 0
    sealed_int4: int = 0
    leased: int = 0
    freed: int = 0
    repeated: int = 0  # puts of an object that was complete already
    refused_full: int = 0
    refused_stale: int = 0
    refused_corrupt: int = 0
    evicted: int = 0  # prefixes that made room for newer ones
    prefix_hits: int = 0  # pieces of prefixes that were asked for and there
    prefix_misses: int = 0
    expired: int = 0  # objects and leases whose time ran out
    quarantined: int = 0  # objects whose memory no other got: a peer that was lost may still have it open
    late: int = 0  # operations that came late, twice or for something unknown, and were ignored

    def note_sealed(self, codec: str) -> None:
        self.sealed += 1
        if codec != "raw":
            setattr(self, f"sealed_{codec}", getattr(self, f"sealed_{codec}") + 1)
