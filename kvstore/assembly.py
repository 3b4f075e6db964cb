"""Checks an object chunk by chunk: each digest, each place, every cell exactly once.

The store runs it on what a writer sends, and the reader runs it again on what the store sends. Of chunks that
a writer puts into a file itself the store checks all but the payload, which passes it by. Keeps no payload.
"""

from __future__ import annotations

from kvstore.digest import ObjectDigest
from kvstore.key import Buffer, require
from kvstore.records import ChunkHeader, ObjectHeader, Seal
from tandem.errors import DataLoss


class Assembly:
    """What has arrived of one object, or of its blocks from `first_block` on. A chunk or a seal that is
    refused changes nothing."""

    def __init__(self, header: ObjectHeader, first_block: int = 0) -> None:
        self.header = header
        self._cell_bytes = header.cell_bytes
        self._first_block = first_block
        self._next_index = 0
        self.digests: list[bytes] = []
        self._digest = ObjectDigest(header)
        self._blocks_of_layer: dict[int, int] = {}  # a bit per block that has arrived
        self._num_cells = 0

    def add(self, chunk: ChunkHeader, payload: Buffer | None) -> None:
        """BAD_MESSAGE if the chunk does not belong here, KV_CORRUPT if its bytes are not what was sent.

        None stands for a payload that only its reader looks at.
        """
        header = self.header
        require(chunk.index >= self._next_index if self._first_block else chunk.index == self._next_index)
        require(chunk.block_start + chunk.num_blocks <= header.num_blocks)
        require(chunk.layer_start + chunk.num_layers <= header.num_layers)
        require(chunk.length == chunk.num_cells * self._cell_bytes)
        layers = range(chunk.layer_start, chunk.layer_start + chunk.num_layers)
        blocks, arrived = ((1 << chunk.num_blocks) - 1) << chunk.block_start, self._blocks_of_layer
        for layer in layers:
            require(not arrived.get(layer, 0) & blocks)
        if payload is not None and self._digest.chunk(chunk.index, chunk, payload) != chunk.digest:
            raise DataLoss
        for layer in layers:
            arrived[layer] = arrived.get(layer, 0) | blocks
        self.digests.append(chunk.digest)
        self._next_index = chunk.index + 1
        behind = max(0, self._first_block - chunk.block_start)
        self._num_cells += max(0, chunk.num_blocks - behind) * chunk.num_layers

    def check(self, seal: Seal) -> None:
        """BAD_MESSAGE if something is missing, KV_CORRUPT if the chunks are not the ones that were sent."""
        require(self._num_cells == (self.header.num_blocks - self._first_block) * self.header.num_layers)
        if (
            self._first_block
        ):  # digests of chunks that were left out are missing; each one's own binds its place
            return require(seal.num_chunks >= self._next_index)
        require(seal.num_chunks == len(self.digests))
        if self._digest.total(self.digests) != seal.total_digest:
            raise DataLoss
        return None
