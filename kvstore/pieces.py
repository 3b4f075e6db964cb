"""Pieces of sequences in the store, as workers that have their KV see them: found and published by tokens.

A sequence's KV is cached in pieces of whole blocks, each an object named by all tokens up to its end
(kvstore/chain.py). Where the bytes come from is its caller's business. Lives on the event loop.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from kvstore.chain import piece_names
from kvstore.client import KvClient
from kvstore.key import Buffer, KvHandle
from kvstore.parts import parts_of
from kvstore.records import ChunkRange, ObjectHeader
from tandem.config import ClusterConfig
from tandem.errors import FailedPrecondition
from tandem.geometry import ModelGeometry
from tandem.prefix_usage import PrefixReport

Export = Callable[[ChunkRange], Awaitable[Buffer]]  # the raw bytes of a part, counted from the first block


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceFormat:
    """What all pieces of a worker have in common. They are raw and in the dtype of prefill workers, however
    KV travels otherwise."""

    tokens: int  # of one piece: whole blocks
    fingerprint: bytes
    dtype: str
    num_layers: int
    block_size: int  # tokens
    block_bytes: int  # of one block across all layers
    chunk_bytes: int

    @classmethod
    def of(cls, config: ClusterConfig, geometry: ModelGeometry, fingerprint: bytes) -> PieceFormat:
        return cls(
            tokens=config.kvstore.prefix_tokens,
            fingerprint=fingerprint,
            dtype=config.kv_dtypes.prefill,
            num_layers=geometry.num_layers,
            block_size=config.cache.block_size,
            block_bytes=geometry.block_bytes(config.cache.block_size, config.kv_dtypes.prefill),
            chunk_bytes=config.kvstore.chunk_bytes,
        )

    @property
    def num_blocks(self) -> int:
        return self.tokens // self.block_size

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    def header(self, tenant: str, name: bytes) -> ObjectHeader:
        """The description of one piece."""
        return ObjectHeader(
            object_id=name,
            epoch=0,
            tenant=tenant,
            fingerprint=self.fingerprint,
            dtype=self.dtype,
            num_layers=self.num_layers,
            num_tokens=self.tokens,
            block_size=self.block_size,
            num_blocks=self.num_blocks,
            total_bytes=self.num_bytes,
            is_prefix=1,
        )


class Pieces:
    """One worker's way to the pieces in the store. What comes of them is added up in `report`."""

    def __init__(self, client: KvClient, form: PieceFormat, report: PrefixReport | None = None) -> None:
        self.form = form
        self.report = report or PrefixReport()
        self._client = client
        self._salts: dict[str, bytes] = {}  # by tenant; another one means that the store started again

    def blocks_of(self, place: int, blocks: Sequence[int]) -> Sequence[int]:
        """Those of a sequence's blocks that one of its pieces fills."""
        size = self.form.num_blocks
        return blocks[place * size : (place + 1) * size]

    async def look_up(self, tenant: str, token_ids: Sequence[int]) -> tuple[list[bytes], list[KvHandle]]:
        """Names of the whole pieces of these tokens, and handles of the first ones that are cached."""
        fingerprint = self.form.fingerprint
        if tenant not in self._salts:
            _, self._salts[tenant] = await self._client.find((), fingerprint, tenant)
        salt = self._salts[tenant]
        names = piece_names(token_ids, self.form.tokens, fingerprint, salt)
        handles, self._salts[tenant] = await self._client.find(names, fingerprint, tenant)
        if self._salts[tenant] != salt:  # names of an earlier life of the store: nothing is there
            return await self.look_up(tenant, token_ids)
        return names, handles

    async def publish(self, tenant: str, token_ids: Sequence[int], export: Export) -> None:
        """Store the whole pieces of these tokens that the store does not have.

        Raises what the store raises; what was stored before stays.
        """
        names, known = await self.look_up(tenant, token_ids)
        for place in range(len(known), len(names)):
            await self._publish_piece(tenant, names[place], place * self.form.num_blocks, export)

    async def _publish_piece(self, tenant: str, name: bytes, first_block: int, export: Export) -> None:
        form = self.form
        try:
            async with self._client.put(form.header(tenant, name)) as writer:
                for part in parts_of(form.num_layers, form.block_bytes, form.chunk_bytes, 0, form.num_blocks):
                    there = replace(part, block_start=first_block + part.block_start)
                    await writer.write(part, await export(there))
                await writer.seal()
            self.report.num_published += 1
        except FailedPrecondition:
            pass  # another worker publishes the same piece just now
