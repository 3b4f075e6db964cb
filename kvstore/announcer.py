"""Tells the shared index which prefixes a store holds.

Each round writes what is new and removes what is gone. A mark beside the entries says that all of them were
written. It goes by itself before they do, or with them when the index is emptied, and a round that does not
find it writes everything again. No object is kept, freed or delayed for the index's sake.
"""

from __future__ import annotations

import asyncio
import logging
from types import TracebackType
from typing import Self

from kvstore.index import TTL_S, IndexDown, PrefixIndex
from kvstore.index_entry import Place
from kvstore.records import ObjectHeader
from kvstore.store import KvStore

log = logging.getLogger(__name__)
MARK_S = TTL_S / 3


class Announcer:
    """One store's voice in the index while the context is open. Owns the connection.

    `address` is where workers find the store.
    """

    def __init__(self, store: KvStore, index: PrefixIndex, address: str) -> None:
        self.index = index
        self._store = store
        self._address = address
        self._mark = f"v1:store:{address}:{store.store_epoch}"
        self._is_behind = True  # something that changed was not written
        self._journal = store.prefixes.share(index.form.names_secret)
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._announce())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait({self._task})
        await self.index.close()

    async def _announce(self) -> None:
        while True:
            try:
                await self._round()
            except IndexDown:
                self._is_behind = True
            except Exception:  # the top of the loop
                self._is_behind = True
                log.exception("telling the prefix index failed")
            await asyncio.sleep(self._store.config.sweep_s)

    async def _round(self) -> None:
        everything = self._is_behind or not await self.index.has(self._mark)
        there, gone = await self._store.turns.take(self._journal.take, all_of_them=everything)
        self._is_behind = True  # until all of it is written
        if everything:  # before the entries: whatever is lost after this, the mark is lost with it
            await self.index.put({self._mark: b"1"}, MARK_S)
        await self.index.put(dict(map(self._entry, there)))
        await self.index.remove(dict(map(self._entry, gone)))
        self._is_behind = False
        self.index.report.num_announced += len(there)

    def _entry(self, header: ObjectHeader) -> tuple[str, bytes]:
        form = self.index.form
        name = form.name(header.fingerprint, header.tenant, header.object_id)
        place = Place(self._address, header.object_id, self._store.store_epoch, header.num_tokens)
        return name, form.pack(name, place)
