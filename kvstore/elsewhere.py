"""Pieces in other stores than a worker's own, found by the shared index (kvstore/index.py)."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import grpc

from kvstore.client import KvClient
from kvstore.index import IndexDown, PrefixIndex
from kvstore.index_entry import Place
from kvstore.key import KvHandle
from kvstore.pieces import PieceFormat, Pieces
from tandem.config import ClusterConfig, KvStoreConfig
from tandem.errors import TandemError
from tandem.internal import InternalPlane

log = logging.getLogger(__name__)
MAX_STORES = 16  # connected to; who was used longest ago is let go


@dataclass(frozen=True, slots=True)
class PieceElsewhere:
    """A piece as the index told of it."""

    handle: KvHandle
    address: str
    name: str  # of the index entry
    value: bytes


class Elsewhere:
    """One worker's way to the stores beside its own. Lives on the event loop; owns the index's connection."""

    def __init__(
        self, index: PrefixIndex, form: PieceFormat, config: KvStoreConfig, plane: InternalPlane
    ) -> None:
        self.index = index
        self._plane = plane
        self._form = form
        self._config = config
        self._stores: OrderedDict[str, tuple[grpc.aio.Channel, KvClient]] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    def of(cls, config: ClusterConfig, pieces: Pieces) -> Elsewhere | None:
        """None where stores share no index."""
        if not config.kvstore.index.url:
            return None
        index = PrefixIndex(config.kvstore.index, pieces.report.index)
        return cls(index, pieces.form, config.kvstore, InternalPlane.of(config))

    async def find(self, tenant: str, object_ids: Sequence[bytes]) -> list[PieceElsewhere]:
        """Where these pieces are, up to the first that nobody has. An index that is slow or gone has none."""
        fingerprint = self._form.fingerprint
        names = [self.index.form.name(fingerprint, tenant, object_id) for object_id in object_ids]
        try:
            found = await self.index.find(names)
        except IndexDown:
            return []
        pieces = []
        for name, (place, value) in found.items():
            if place.num_tokens != self._form.tokens:
                break
            pieces.append(PieceElsewhere(self._handle(place), place.address, name, value))
        return pieces

    def store(self, piece: PieceElsewhere) -> KvClient:
        """The store that has it."""
        if piece.address not in self._stores:
            own = self._plane.channel(piece.address)
            self._stores[piece.address] = own, KvClient(own, self._config)
        self._stores.move_to_end(piece.address)
        while len(self._stores) > MAX_STORES:
            _, (oldest, _) = self._stores.popitem(last=False)
            self._start(oldest.close())
        return self._stores[piece.address][1]

    def note_missing(self, piece: PieceElsewhere, error: TandemError) -> None:
        """The store has it no more: nobody else shall be sent there."""
        self.index.report.num_stale += 1
        log.info("a piece that the prefix index named is not there: %s", error.reason)
        self._start(self._remove(piece))

    async def close(self) -> None:
        while self._tasks:
            await asyncio.wait(self._tasks)
        for own, _ in self._stores.values():
            await own.close()
        await self.index.close()

    async def _remove(self, piece: PieceElsewhere) -> None:
        with suppress(IndexDown):
            await self.index.remove({piece.name: piece.value})

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _handle(self, place: Place) -> KvHandle:
        return KvHandle(
            object_id=place.object_id,
            epoch=0,
            store_epoch=place.store_epoch,
            num_bytes=self._form.num_bytes,
            num_tokens=self._form.tokens,
            fingerprint=self._form.fingerprint,
        )
