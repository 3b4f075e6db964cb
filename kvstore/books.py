"""The store's books: objects, the bytes they are charged, and the deadline that will end each.

Whatever changes one of the three changes all of them here, so that nothing is charged without an
object and no object is without a deadline. Decides nothing: who may do what is kvstore/store.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from kvstore.backend import Backend, Moving, Placeable, Reserving, Use
from kvstore.expiry import ExpiryHeap
from kvstore.key import Buffer, ObjectKey
from kvstore.objects import KvObject, Lease, ObjectState
from kvstore.prefix_journal import PrefixJournal
from kvstore.records import ObjectHeader, Seal
from kvstore.shares import Shares
from tandem.config import KvStoreConfig
from tandem.ledger import Ledger, PoolAudit

MAX_LEASE_FACTOR = 10  # no lease is longer than this many default ones
WRITER, SEALED = "writer", "sealed"  # holds on an object's bytes, beside one per lease


class Books:
    """Every object that is charged for. `on_free` hears of each that is not any more."""

    def __init__(
        self,
        backend: Backend,
        total_bytes: int,
        prefix_bytes: int,
        config: KvStoreConfig,
        clock: Callable[[], float],
        on_free: Callable[[KvObject], None],
    ) -> None:
        self.num_evicted = self.num_quarantined = 0
        self.objects: dict[ObjectKey, KvObject] = {}
        self.journal: PrefixJournal | None = None  # for whoever wants to know which prefixes there are
        self.ledger = Ledger("kvstore", "bytes", total_bytes, clock)
        self.prefix_ledger = Ledger("kvstore prefixes", "bytes", prefix_bytes, clock)
        self.shares = Shares(total_bytes, prefix_bytes, config)
        self._evictable: OrderedDict[ObjectKey, KvObject] = OrderedDict()  # least recently used first
        self._backend = backend
        # Looked at once: what a protocol asks of an object takes longer to find out than to book a chunk.
        self._reserving = backend if isinstance(backend, Reserving) else None
        self._placeable = backend if isinstance(backend, Placeable) else None
        if isinstance(backend, Moving):
            backend.watch(self._use_of)
        self._config = config
        self._clock = clock
        self._on_free = on_free
        self._expiry: ExpiryHeap[tuple[ObjectKey, str]] = ExpiryHeap()  # "" or the holder of a lease

    def reserve(self, header: ObjectHeader, writer: str = "") -> KvObject | None:
        """A new object with all its bytes charged, or None if they do not fit now. The least recently used
        prefixes that nobody reads make room for a new one."""
        obj, ledger = KvObject(header, writer), self.ledger_of(header)
        if header.is_prefix and header.total_bytes <= ledger.total:
            while ledger.free < header.total_bytes and self._evictable:
                self.free(next(iter(self._evictable.values())), ObjectState.EXPIRED)
                self.num_evicted += 1
        if not ledger.reserve(obj.owner, header.total_bytes, generation=header.epoch, hold=WRITER):
            return None
        self.objects[obj.key] = obj
        self.shares.reserved(obj)
        self._wait(obj, self._config.put_deadline_s)
        if self._reserving is not None:
            try:
                self._reserving.place(obj.key, header.most_message_bytes)
            except BaseException:
                self.free(obj, ObjectState.RELEASED)
                raise
        return obj

    def keep(self, obj: KvObject, digest: bytes, message: Buffer) -> None:
        """Keep the object's next message; its put deadline starts again."""
        self._backend.put(obj.key, len(obj.digests), bytes(message))
        self._note_kept(obj, digest)

    def keep_placed(self, obj: KvObject, digest: bytes, num_bytes: int) -> None:
        """The same for a message of so many bytes that lies in its place."""
        assert self._placeable is not None, obj.key
        self._placeable.accept(obj.key, num_bytes)
        self._note_kept(obj, digest)

    def _note_kept(self, obj: KvObject, digest: bytes) -> None:
        obj.digests.append(digest)
        self._wait(obj, self._config.put_deadline_s)

    def seal(self, obj: KvObject, seal: Seal) -> None:
        obj.to(ObjectState.SEALED)
        obj.seal = seal
        self.shares.written(obj)
        self._hold(obj, SEALED)
        self._drop_hold(obj, WRITER)
        self._wait_for_reader(obj)
        if obj.header.is_prefix and self.journal is not None:
            self.journal.note_sealed(obj.header)

    def lease(self, obj: KvObject, lease: Lease, lease_s: float) -> None:
        """Let a holder in; an earlier lease of the same holder is over."""
        if obj.state is ObjectState.SEALED:
            obj.to(ObjectState.LEASED)
            self._expiry.remove((obj.key, ""))
            self._evictable.pop(obj.key, None)
        obj.has_lost_peer |= lease.holder in obj.leases
        obj.leases[lease.holder] = lease
        self._hold(obj, lease.hold)
        self.renew(obj, lease.holder, lease_s)

    def renew(self, obj: KvObject, holder: str, lease_s: float) -> None:
        """Let the lease run from now; 0 is the default time."""
        default_s = self._config.lease_s
        lease_s = min(lease_s, MAX_LEASE_FACTOR * default_s) if lease_s > 0 else default_s
        self._expiry.set((obj.key, holder), self._clock() + lease_s)

    def end_lease(self, obj: KvObject, holder: str, *, has_expired: bool = False) -> None:
        """After the last one the object waits for another reader, unless that lease ran out; a prefix waits
        in any case."""
        obj.has_lost_peer |= has_expired
        has_expired = has_expired and not obj.header.is_prefix
        if len(obj.leases) > 1:
            self._forget_lease(obj, holder)
        elif obj.state is ObjectState.RELEASED or has_expired:
            self.free(obj, ObjectState.EXPIRED if has_expired else ObjectState.RELEASED)
        else:
            self._forget_lease(obj, holder)
            obj.to(ObjectState.SEALED)
            self._wait_for_reader(obj)

    def give_up(self, obj: KvObject) -> None:
        """Free the object now, or when its last lease ends."""
        if obj.leases:
            obj.to(ObjectState.RELEASED)
        else:
            self.free(obj, ObjectState.RELEASED)

    def free(self, obj: KvObject, why: ObjectState) -> None:
        if obj.state is not ObjectState.RELEASED:
            obj.to(why)
        obj.to(ObjectState.FREED)
        for holder in list(obj.leases):
            self._forget_lease(obj, holder)
        self._expiry.remove((obj.key, ""))
        self._evictable.pop(obj.key, None)
        self._give_back(obj)
        self._drop_hold(obj, WRITER if obj.seal is None else SEALED)
        if obj.seal is None:
            self.shares.written(obj)
        self.shares.freed(obj)
        del self.objects[obj.key]
        if self.journal is not None:
            self.journal.note_freed(obj.header)
        self._on_free(obj)

    def sweep(self, now_s: float) -> int:
        """End everything that is due; returns how many objects and leases were."""
        num_due = 0
        for key, holder in self._expiry.pop_due(now_s):
            obj = self.objects[key]
            if holder:
                self.end_lease(obj, holder, has_expired=True)
            else:
                self.free(obj, ObjectState.EXPIRED)
            num_due += 1
        return num_due

    def bytes_in(self, *states: ObjectState) -> int:
        """Payload bytes charged to objects in these states."""
        return sum(obj.header.total_bytes for obj in list(self.objects.values()) if obj.state in states)

    def ledger_of(self, header: ObjectHeader) -> Ledger:
        """Hand-offs and prefixes have a budget each: neither can take the other's."""
        return self.prefix_ledger if header.is_prefix else self.ledger

    def audits(self) -> tuple[PoolAudit, PoolAudit]:
        """The books of hand-offs and of prefixes; an orphan is a record without an object. Any thread may
        ask."""
        live = {obj.owner for obj in list(self.objects.values())}
        return self.ledger.audit(live), self.prefix_ledger.audit(live)

    def check_integrity(self) -> None:
        """free + owned == total, and everything owned is an object that some deadline will end."""
        audits = self.audits()
        for audit in audits:
            assert audit.is_balanced, audit
            assert not audit.orphans, audit.orphans
        assert sum(audit.owned for audit in audits) == self.bytes_in(*ObjectState), audits
        idle = {obj.key for obj in self.objects.values() if self._is_evictable(obj)}
        assert idle == self._evictable.keys(), (idle, self._evictable)
        self.shares.check_integrity(list(self.objects.values()))
        num_deadlines = sum(max(1, len(obj.leases)) for obj in self.objects.values())
        assert num_deadlines == len(self._expiry), (num_deadlines, len(self._expiry))

    def _wait(self, obj: KvObject, wait_s: float) -> None:
        self._expiry.set((obj.key, ""), self._clock() + wait_s)

    def _wait_for_reader(self, obj: KvObject) -> None:
        if obj.header.is_prefix:
            self._evictable[obj.key] = obj
            self._wait(obj, self._config.prefix_s)
        else:
            self._wait(obj, self._config.lease_s)

    @staticmethod
    def _is_evictable(obj: KvObject) -> bool:
        return bool(obj.header.is_prefix) and obj.state is ObjectState.SEALED

    def _give_back(self, obj: KvObject) -> None:
        """Memory that somebody may still have open is left to the last who has."""
        if self._placeable is None:
            self._backend.delete(obj.key)
        elif obj.use is Use.NONE:
            self._placeable.recycle(obj.key)
        else:
            self._backend.delete(obj.key)
            self.num_quarantined += 1

    def _use_of(self, key: ObjectKey) -> Use:
        obj = self.objects.get(key)
        return Use.NONE if obj is None else obj.use

    def _hold(self, obj: KvObject, hold: str) -> None:
        held = self.ledger_of(obj.header).hold(obj.owner, hold, generation=obj.key.epoch)
        assert held, (obj.key, hold)

    def _drop_hold(self, obj: KvObject, hold: str) -> None:
        self.ledger_of(obj.header).release(obj.owner, generation=obj.key.epoch, hold=hold)

    def _forget_lease(self, obj: KvObject, holder: str) -> None:
        self._drop_hold(obj, obj.leases.pop(holder).hold)
        self._expiry.remove((obj.key, holder))
