"""Small objects with random bytes, and the frames a writer makes of them."""

from __future__ import annotations

import random
from dataclasses import dataclass

from kvstore.digest import ObjectDigest
from kvstore.key import KvHandle
from kvstore.records import ChunkHeader, ChunkRange, ObjectHeader, Seal
from kvstore.store import KvStore
from kvstore.wire import encode

BLOCK_SIZE = 4
CELL_BYTES = 2 * BLOCK_SIZE * 4 * 2  # keys and values, float32, kv_heads · head_dim = 2


def make_header(
    object_id: bytes = bytes(16),
    *,
    num_blocks: int = 3,
    num_layers: int = 2,
    cell_bytes: int = CELL_BYTES,
    **changes,
) -> ObjectHeader:
    values = {
        "object_id": object_id,
        "epoch": 1,
        "tenant": "tenant-a",
        "fingerprint": bytes(32),
        "dtype": "float32",
        "num_layers": num_layers,
        "num_tokens": num_blocks * BLOCK_SIZE - 1,
        "block_size": BLOCK_SIZE,
        "num_blocks": num_blocks,
        "total_bytes": num_blocks * num_layers * cell_bytes,
    }
    return ObjectHeader(**(values | changes))


def make_ranges(header: ObjectHeader, *, blocks: int = 2, layers: int | None = None) -> list[ChunkRange]:
    """The whole object in chunks of `blocks` × `layers`."""
    layers = layers or header.num_layers
    return [
        ChunkRange(
            block_start=block,
            num_blocks=min(blocks, header.num_blocks - block),
            layer_start=layer,
            num_layers=min(layers, header.num_layers - layer),
        )
        for block in range(0, header.num_blocks, blocks)
        for layer in range(0, header.num_layers, layers)
    ]


@dataclass(frozen=True, slots=True)
class Sample:
    header: ObjectHeader
    chunks: list[tuple[ChunkHeader, bytes]]
    seal: Seal

    @property
    def frames(self) -> list[bytes]:
        return [encode(self.header), *(encode(*chunk) for chunk in self.chunks), encode(self.seal)]


def make_chunk(header: ObjectHeader, index: int, where: ChunkRange, payload: bytes) -> ChunkHeader:
    return ChunkHeader(
        index=index,
        block_start=where.block_start,
        num_blocks=where.num_blocks,
        layer_start=where.layer_start,
        num_layers=where.num_layers,
        length=len(payload),
        digest=ObjectDigest(header).chunk(index, where, payload),
    )


def make_sample(header: ObjectHeader | None = None, seed: int = 0, **cut) -> Sample:
    header = header or make_header()
    rng = random.Random(seed)
    chunks = []
    for index, where in enumerate(make_ranges(header, **cut)):
        payload = rng.randbytes(where.num_cells * header.cell_bytes)
        chunks.append((make_chunk(header, index, where, payload), payload))
    total = ObjectDigest(header).total(chunk.digest for chunk, _ in chunks)
    return Sample(header, chunks, Seal(num_chunks=len(chunks), total_digest=total))


def put(store: KvStore, sample: Sample) -> KvHandle:
    ticket = store.reserve(sample.header)
    for chunk, payload in sample.chunks:
        store.append(ticket, chunk, payload, encode(chunk, payload))
    return store.seal(ticket, sample.seal)
