"""What one operation on the store costs while it holds more and more objects."""

from __future__ import annotations

import time
from dataclasses import dataclass

from kvstore.backends.memory import MemoryBackend
from kvstore.digest import ObjectDigest
from kvstore.key import KvHandle
from kvstore.records import ChunkHeader, ChunkRange, ObjectHeader, Seal
from kvstore.store import KvStore
from kvstore.wire import encode
from tandem.config import KvStoreConfig

PAYLOAD = bytes(64)  # one token of one layer: the books are measured, not the bytes
ROUNDS = 2000
FOREVER_S = 1e6


@dataclass(frozen=True, slots=True)
class Growth:
    """Microseconds for a whole life: reserve, append, seal, lease, read, end, release."""

    num_objects: int
    life_us: float


def measure(counts: list[int]) -> list[Growth]:
    """The store is filled up to each count in turn."""
    config = KvStoreConfig(put_deadline_s=FOREVER_S, lease_s=FOREVER_S)
    store, rows = KvStore(MemoryBackend(), 1 << 40, config), []
    num_objects = 0
    for count in counts:
        for number in range(num_objects, count):
            _put(store, number)
        num_objects = count
        times = []
        for number in range(ROUNDS):
            began_s = time.perf_counter()
            handle = _put(store, (1 << 60) + number)
            lease = store.lease(handle, "bench")
            for _ in store.read(lease):
                pass
            store.end(lease)
            store.release(handle)
            times.append(time.perf_counter() - began_s)
        rows.append(Growth(count, 1e6 * sorted(times)[ROUNDS // 2]))
    return rows


def _put(store: KvStore, number: int) -> KvHandle:
    header = ObjectHeader(
        object_id=number.to_bytes(16, "little"),
        epoch=0,
        tenant="",
        fingerprint=bytes(32),
        dtype="float32",
        num_layers=1,
        num_tokens=1,
        block_size=1,
        num_blocks=1,
        total_bytes=len(PAYLOAD),
    )
    digest, where = ObjectDigest(header), ChunkRange(block_start=0, num_blocks=1, layer_start=0, num_layers=1)
    own = digest.chunk(0, where, PAYLOAD)
    chunk = ChunkHeader(
        block_start=0, num_blocks=1, layer_start=0, num_layers=1, index=0, length=len(PAYLOAD), digest=own
    )
    ticket = store.reserve(header)
    store.append(ticket, chunk, PAYLOAD, encode(chunk, PAYLOAD))
    return store.seal(ticket, Seal(num_chunks=1, total_digest=digest.total([own])))
