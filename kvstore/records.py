"""The three records an object is made of: its header, its chunks, its seal. A fourth stands for chunks that
lie in the object's file already.

Each checks itself when built, so a record that exists is well formed: a bad one is BAD_MESSAGE
wherever it came from. Knows nothing of frames, of sockets or of what the bytes mean.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.key import FINGERPRINT_BYTES, OBJECT_ID_BYTES, KvHandle, ObjectKey, require
from tandem import geometry
from tandem.fingerprint import KV_LAYOUT
from tandem.geometry import DTYPE_BYTES, KV_CODECS

DIGEST_BYTES = 16
MAX_CHUNK_BYTES = 4 << 20
MAX_CHUNKS = 1 << 20
MAX_BLOCKS = 1 << 16
MAX_LAYERS = 1 << 10
MAX_BLOCK_SIZE = 1 << 10
MAX_CHUNK_OVERHEAD = 256  # of a chunk's message over its payload
MAX_OBJECT_BYTES = 1 << 50
MAX_EPOCH = (1 << 64) - 1
MAX_TENANT = 128  # characters


def _in(value: int, low: int, high: int) -> None:
    require(low <= value <= high)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectHeader:
    """What an object is, said before its first byte. Bytes are charged for all of it at once."""

    object_id: bytes
    epoch: int
    tenant: str
    fingerprint: bytes
    codec: str = "raw"
    dtype: str
    layout: str = KV_LAYOUT
    num_layers: int
    num_tokens: int
    block_size: int  # tokens
    num_blocks: int
    total_bytes: int  # of all payloads
    is_prefix: int = 0  # 1: named by its tokens, kept for whoever comes by and evicted for newer ones

    def __post_init__(self) -> None:
        require(len(self.object_id) == OBJECT_ID_BYTES)
        require(len(self.fingerprint) == FINGERPRINT_BYTES)
        require(len(self.tenant) <= MAX_TENANT)
        require(self.codec in KV_CODECS and self.layout == KV_LAYOUT and self.dtype in DTYPE_BYTES)
        _in(self.epoch, 0, MAX_EPOCH)
        _in(self.is_prefix, 0, 1)
        _in(self.num_layers, 1, MAX_LAYERS)
        _in(self.block_size, 1, MAX_BLOCK_SIZE)
        _in(self.num_blocks, 1, MAX_BLOCKS)
        _in(self.total_bytes, 1, MAX_OBJECT_BYTES)
        require(self.num_tokens >= 1)
        require(geometry.num_blocks(self.num_tokens, self.block_size) == self.num_blocks)
        # A cell is keys and values of every slot of the block: an odd total cannot be cut into cells.
        slots = self.num_blocks * self.num_layers * 2 * self.block_size
        require(self.total_bytes % (slots * (DTYPE_BYTES[self.dtype] if self.codec == "raw" else 1)) == 0)

    @property
    def key(self) -> ObjectKey:
        return ObjectKey(self.object_id, self.epoch)

    @property
    def cell_bytes(self) -> int:
        """Bytes of one block in one layer, keys and values."""
        return self.total_bytes // (self.num_blocks * self.num_layers)

    @property
    def most_message_bytes(self) -> int:
        """Bytes of all chunk messages, however the object is cut."""
        return self.total_bytes + self.num_blocks * self.num_layers * MAX_CHUNK_OVERHEAD

    def handle(self, store_epoch: int) -> KvHandle:
        return KvHandle(
            object_id=self.object_id,
            epoch=self.epoch,
            store_epoch=store_epoch,
            num_bytes=self.total_bytes,
            num_tokens=self.num_tokens,
            fingerprint=self.fingerprint,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkRange:
    """Which part of an object a payload is: [num_blocks, num_layers, 2, block_size, kv_heads, head_dim]."""

    block_start: int
    num_blocks: int
    layer_start: int
    num_layers: int

    def __post_init__(self) -> None:
        require(1 <= self.num_blocks <= MAX_BLOCKS and 1 <= self.num_layers <= MAX_LAYERS)
        require(0 <= self.block_start <= MAX_BLOCKS and 0 <= self.layer_start <= MAX_LAYERS)

    @property
    def num_cells(self) -> int:
        return self.num_blocks * self.num_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkHeader(ChunkRange):
    """A range, its place in the stream, and what its payload must hash to (kvstore/digest.py)."""

    index: int
    length: int  # bytes of payload
    digest: bytes

    def __post_init__(self) -> None:
        ChunkRange.__post_init__(self)
        require(0 <= self.index < MAX_CHUNKS and 1 <= self.length <= MAX_CHUNK_BYTES)
        require(len(self.digest) == DIGEST_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seal:
    """Says that the object is complete."""

    num_chunks: int
    total_digest: bytes  # over the chunk digests in order

    def __post_init__(self) -> None:
        _in(self.num_chunks, 1, MAX_CHUNKS)
        require(len(self.total_digest) == DIGEST_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Says that the object's file holds whole chunk messages up to a byte."""

    end: int

    def __post_init__(self) -> None:
        _in(self.end, 1, MAX_OBJECT_BYTES)


Record = ObjectHeader | ChunkHeader | Seal | Placed
