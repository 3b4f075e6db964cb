"""What a payload must hash to, so that only the right bytes in the right place pass.

A chunk's digest covers its object (id, epoch, tenant, fingerprint, shape) and its place (index,
ranges, length) before the payload. A flipped bit, swapped chunks, a truncation, another object's or
tenant's bytes and a stale attempt therefore all miss. What binds is SHA-256, cut to 16 bytes; the
payload enters it as its XXH3 hash of 128 bits (Collet, github.com/Cyan4973/xxHash), ten times faster
where measured: each byte is hashed two or three times on its way, and the hash must not be what limits it.
XXH3 finds whatever chance does to bytes. It is no defence against a peer that forges them: peers are
told apart before they may speak (SECURITY.md).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable

import xxhash

from kvstore.key import Buffer
from kvstore.records import DIGEST_BYTES, ChunkRange, ObjectHeader

_OBJECT = struct.Struct("<16sQ32sIIIIQI")
_CHUNK = struct.Struct("<cIIIIIQ")
_SEAL = struct.Struct("<cI")


class ObjectDigest:
    """Digests of one object's chunks and of its seal."""

    def __init__(self, header: ObjectHeader) -> None:
        self._bound = hashlib.sha256(b"tandem.kv.v2")
        self._bound.update(
            _OBJECT.pack(
                header.object_id,
                header.epoch,
                header.fingerprint,
                header.num_layers,
                header.num_tokens,
                header.block_size,
                header.num_blocks,
                header.total_bytes,
                header.is_prefix,
            )
        )
        for text in (header.tenant, header.codec, header.dtype, header.layout):
            encoded = text.encode()
            self._bound.update(struct.pack("<I", len(encoded)) + encoded)

    def chunk(self, index: int, where: ChunkRange, payload: Buffer) -> bytes:
        digest = self._bound.copy()
        place = (where.block_start, where.num_blocks, where.layer_start, where.num_layers)
        digest.update(_CHUNK.pack(b"c", index, *place, memoryview(payload).nbytes))
        digest.update(xxhash.xxh3_128_digest(payload))
        return digest.digest()[:DIGEST_BYTES]

    def total(self, chunk_digests: Iterable[bytes]) -> bytes:
        digests = b"".join(chunk_digests)
        digest = self._bound.copy()
        digest.update(_SEAL.pack(b"s", len(digests) // DIGEST_BYTES) + digests)
        return digest.digest()[:DIGEST_BYTES]
