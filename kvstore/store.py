"""The KV store itself: who may write, who may read, and when bytes come back.

The life of an object here:
1. `reserve` charges all its bytes at once, or refuses; from then on it has a put deadline, counted
   from its last chunk.
2. `append` checks each chunk (kvstore/assembly.py) and keeps its message.
3. `seal` makes it immutable and readable. Without a reader it lives for one lease time.
4. `lease` and `read` serve it to a holder, `renew` keeps the lease. When the last lease is ended the
   object waits for another reader; when the last lease runs out it goes.
5. `release` gives up a lease or, once the last has ended, the object; `forget` what has no handle yet.

Plain and synchronous, run by one thread at a time (`turns`); every operation first sweeps what is due,
so nothing past its deadline is ever seen. Knows nothing of sockets, tensors or what the bytes mean.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from kvstore.assembly import Assembly
from kvstore.backend import Backend
from kvstore.books import Books
from kvstore.fence import Fence
from kvstore.key import Buffer, KvHandle, ObjectKey, require
from kvstore.listing import ObjectInfo, list_objects
from kvstore.mapping import MappedObject
from kvstore.objects import KvObject, Lease, ObjectStat, ObjectState, PutTicket, StoreCounters
from kvstore.places import Places
from kvstore.prefixes import Prefixes
from kvstore.records import ChunkHeader, ObjectHeader, Placed, Seal
from kvstore.refusals import refuse_full
from kvstore.turns import Turns
from kvstore.wire import encode
from tandem.config import KvStoreConfig
from tandem.errors import DataLoss, FailedPrecondition, NotFound
from tandem.ledger import PoolAudit

MAX_HOLDER = 256  # characters


class KvStore:
    """All objects of one life of the store."""

    def __init__(
        self,
        backend: Backend,
        total_bytes: int,
        config: KvStoreConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
        prefix_bytes: int = 0,
    ) -> None:
        self.store_epoch = secrets.randbits(64)
        self.counters = StoreCounters()
        self.config = config or KvStoreConfig()
        self.turns = Turns(in_thread=backend.is_blocking)
        self._backend = backend
        self._clock = clock
        self._books = Books(backend, total_bytes, prefix_bytes, self.config, clock, self._note_freed)
        self._fence = Fence(self._books, clock)
        self.places = Places(backend)
        self.prefixes = Prefixes(self._books, self.counters, self.store_epoch)

    def reserve(self, header: ObjectHeader, writer: str = "") -> PutTicket:
        """Charge the object's bytes, all or nothing. A later attempt ends an earlier one's writing."""
        self.sweep()
        if not self._fence.lets_in(header):
            raise self._stale("a later attempt has written this object")
        existing = self._books.objects.get(header.key)
        if existing is not None:
            return self._repeat(existing, header)
        self._books.shares.check(header, writer)
        obj = self._books.reserve(header, writer)
        self.counters.evicted = self._books.num_evicted
        if obj is None:
            self.counters.refused_full += 1
            raise refuse_full(header.total_bytes, self._books.ledger_of(header), self.config.sweep_s)
        self.counters.reserved += 1
        return PutTicket(obj, Assembly(header))

    def append(self, ticket: PutTicket, chunk: ChunkHeader, payload: Buffer, message: Buffer) -> None:
        """Check a chunk and keep the message it came in."""
        self.sweep()
        obj = self._writable(ticket)
        self._check(ticket, chunk, payload)
        if not ticket.is_repeat:
            self._books.keep(obj, chunk.digest, message)
        elif obj.digests[chunk.index : chunk.index + 1] != [chunk.digest]:
            raise self._stale("the object exists with other content")

    def append_placed(self, ticket: PutTicket, placed: Placed) -> None:
        """Check the chunks that the writer has put into the object's file, and keep them there.

        One reader waits for a hand-off, and checks every byte before it uses any: only what is around them is
        looked at here. A cached beginning is for many, and is found by its name only if it is right.
        """
        self.sweep()
        obj = self._writable(ticket)
        for chunk, payload, num_bytes in self.places.chunks(ticket, placed):
            self._check(ticket, chunk, payload if obj.header.is_prefix else None)
            self._books.keep_placed(obj, chunk.digest, num_bytes)

    def seal(self, ticket: PutTicket, seal: Seal) -> KvHandle:
        """Make a complete object readable. An incomplete one stays reserved until its put deadline."""
        self.sweep()
        obj = self._writable(ticket)
        ticket.assembly.check(seal)
        if not ticket.is_repeat:
            self._books.seal(obj, seal)
            self.counters.note_sealed(obj.header.codec)
            ticket.is_repeat = True
        elif seal != obj.seal:
            raise self._stale("the object exists with other content")
        return obj.header.handle(self.store_epoch)

    def abort(self, ticket: PutTicket) -> bool:
        """The writer is gone: free what it did not seal. Says whether there was anything to free."""
        self.sweep()
        obj = ticket.object
        if ticket.is_repeat or obj.state is not ObjectState.RESERVED:
            return False
        self._books.free(obj, ObjectState.RELEASED)
        return True

    def lease(self, handle: KvHandle, holder: str, lease_s: float = 0.0) -> Lease:
        """Let `holder` read for `lease_s`; an earlier lease of the same holder is over."""
        require(0 < len(holder) <= MAX_HOLDER)
        obj = self.known(handle)
        if obj.state is ObjectState.RESERVED:
            raise NotFound("NO_SUCH_HANDLE", "not found")
        if not obj.is_readable:
            raise self._stale("handle has expired or was given up")
        lease = Lease(handle, holder)
        self._books.lease(obj, lease, lease_s)
        self.counters.leased += 1
        return lease

    def read(self, lease: Lease, first: int = 0) -> Iterator[bytes]:
        """Messages from that one on: header, chunks, seal. Fails as soon as the lease is over."""
        obj = self.leased(lease)
        assert obj.seal is not None, obj.state
        for index in range(first, obj.seal.num_chunks + 1):
            self.leased(lease)
            yield self.message(obj, index)
        yield encode(obj.seal)

    def lease_to_map(self, handle: KvHandle, holder: str, lease_s: float = 0.0) -> MappedObject | None:
        """Lease the object and say where on this host it lies; None, and nothing leased, if nowhere."""
        if not self.places.may_map:
            return None
        lease = self.lease(handle, holder, lease_s)
        mapped = self.places.for_reader(self.leased(lease))
        if mapped is None:
            self.end(lease)
        return mapped

    def renew(self, handle: KvHandle, holder: str, lease_s: float = 0.0) -> None:
        """Let a lease run for `lease_s` from now; STALE_HANDLE if it is over."""
        obj = self.known(handle)
        if holder not in obj.leases:
            raise self._stale("lease is over")
        self._books.renew(obj, holder, lease_s)

    def end(self, lease: Lease) -> bool:
        """End exactly this lease; a newer one of the same holder stays."""
        self.sweep()
        obj = self._books.objects.get(lease.handle.key)
        if obj is None or obj.leases.get(lease.holder) is not lease:
            return self._late()
        self._books.end_lease(obj, lease.holder)
        return True

    def release(self, handle: KvHandle, holder: str = "") -> bool:
        """Give up a holder's lease, or without a holder the object. Late, repeated, unknown: ignored."""
        self.sweep()
        obj = self._books.objects.get(handle.key)
        if obj is None or handle != obj.header.handle(self.store_epoch):
            return self._late()
        if holder not in obj.leases if holder else obj.state is ObjectState.RELEASED:
            return self._late()
        if holder:
            self._books.end_lease(obj, holder)
        else:
            self._books.give_up(obj)
        return True

    def forget(self, key: ObjectKey, tenant: str) -> bool:
        """Nobody wants this attempt: free what there is of it, and refuse what comes of it later."""
        self.sweep()
        obj = self._books.objects.get(key)
        self._fence.overtake(key.object_id, tenant, key.epoch + 1)
        if obj is None or obj.state is ObjectState.RELEASED:
            return self._late()
        if obj.is_readable:
            self._books.give_up(obj)
        return True

    def stat(self, handle: KvHandle) -> ObjectStat:
        obj = self.known(handle)
        return ObjectStat(obj.state, obj.header.total_bytes, len(obj.leases))

    def sweep(self, now_s: float | None = None) -> int:
        """End everything that is due; returns how many objects and leases were."""
        num_due = self._books.sweep(self._clock() if now_s is None else now_s)
        self.counters.expired += num_due
        return num_due

    def find(self, object_ids: Sequence[bytes], fingerprint: bytes, tenant: str) -> list[KvHandle]:
        """Handles of the prefixes that are readable, up to the first that is not."""
        self.sweep()
        return self.prefixes.find(object_ids, fingerprint, tenant)

    def list_objects(self, limit: int) -> list[ObjectInfo]:
        """What there is, the oldest first, hand-offs before prefixes."""
        self.sweep()
        return list(islice(list_objects(self._books), limit))

    def audit(self) -> PoolAudit:
        """The books of hand-offs: empty when nothing runs."""
        return self._books.audits()[0]

    def audits(self) -> tuple[PoolAudit, PoolAudit]:
        """The books of hand-offs and those of cached prefixes."""
        return self._books.audits()

    def bytes_in(self, *states: ObjectState) -> int:
        return self._books.bytes_in(*states)

    def check_integrity(self) -> None:
        self._books.check_integrity()

    def close(self) -> None:
        """Finish what was asked for and give the backend's space back."""
        self.turns.close()
        self._backend.close()

    def message(self, obj: KvObject, index: int) -> bytes:
        """Its header, or a chunk from 1 on."""
        return self._backend.get(obj.key, index - 1) if index else encode(obj.header)

    def _repeat(self, obj: KvObject, header: ObjectHeader) -> PutTicket:
        """The same put again is checked against what is kept; while the first goes on, it is refused."""
        if header != obj.header or not obj.is_readable:
            raise self._stale("the object exists with other content or is being written")
        self.counters.repeated += 1
        return PutTicket(obj, Assembly(header), is_repeat=True)

    def _check(self, ticket: PutTicket, chunk: ChunkHeader, payload: Buffer | None) -> None:
        try:
            ticket.assembly.add(chunk, payload)
        except DataLoss:
            self.counters.refused_corrupt += 1
            raise

    def _writable(self, ticket: PutTicket) -> KvObject:
        obj = ticket.object
        if obj.is_readable if ticket.is_repeat else obj.state is ObjectState.RESERVED:
            return obj
        raise self._stale("writing came too late")

    def leased(self, lease: Lease) -> KvObject:
        """Raises STALE_HANDLE if the lease is over."""
        self.sweep()
        obj = self._books.objects.get(lease.handle.key)
        if obj is None or obj.leases.get(lease.holder) is not lease:
            raise self._stale("lease is over")
        return obj

    def known(self, handle: KvHandle) -> KvObject:
        """Raises NO_SUCH_HANDLE or STALE_HANDLE if it is not there (any more), FINGERPRINT_MISMATCH."""
        self.sweep()
        if handle.store_epoch != self.store_epoch:
            raise self._stale("handle is from an earlier store epoch")
        obj = self._books.objects.get(handle.key)
        if obj is None and self._fence.has_seen(handle.object_id):
            raise self._stale("handle has expired or was given up")
        if obj is not None and handle.fingerprint != obj.header.fingerprint:
            raise FailedPrecondition("FINGERPRINT_MISMATCH", "prefill and decode builds differ")
        if obj is None or handle != obj.header.handle(self.store_epoch):
            raise NotFound("NO_SUCH_HANDLE", "not found")
        return obj

    def _note_freed(self, obj: KvObject) -> None:
        self._fence.note_freed(obj)
        self.counters.freed += 1
        self.counters.quarantined = self._books.num_quarantined

    def _late(self) -> bool:
        self.counters.late += 1
        return False

    def _stale(self, message: str) -> FailedPrecondition:
        self.counters.refused_stale += 1
        return FailedPrecondition("STALE_HANDLE", message)
