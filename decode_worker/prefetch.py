"""Fetches KV of prompts that are still being computed, into blocks reserved for the decode to come.

An order to prefetch promises nothing: what fails here is done again, in the usual way, when the order to
decode arrives. Until then the blocks belong to the prefetch; `fetch` hands them over. Lives on the event
loop.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import replace

from decode_worker.reservation import Reservations
from decode_worker.restore import KvRestorer
from decode_worker.sequence import DecodeSequence, Started
from kvstore.key import KvHandle
from tandem.engine.block_pool import BlockPool
from tandem.errors import TandemError
from tandem.work import Work

log = logging.getLogger(__name__)

Key = tuple[str, int]  # request, attempt


class Prefetch:
    """The blocks of one request to come. `handle` is set once all of that KV is in them."""

    def __init__(
        self, work: Work, handle: KvHandle, reservations: Reservations, restorer: KvRestorer
    ) -> None:
        self.blocks: list[int] = []
        self.handle: KvHandle | None = None
        self.placing_ns = 0
        self._reservations = reservations
        self._restorer = restorer
        self.task = asyncio.get_running_loop().create_task(self._run(work, handle))

    async def _run(self, work: Work, handle: KvHandle) -> None:
        try:
            async with asyncio.timeout_at(work.deadline_s):
                self.blocks = await self._reservations.take(work)
                self.placing_ns = await self._restorer.follow(work, handle, self.blocks)
                self.handle = handle
        except (TandemError, TimeoutError) as error:
            log.info("could not prefetch %s: %s", work.request_id, getattr(error, "reason", "late"))
        except Exception:
            log.exception("prefetch of %s failed", work.request_id)


class Prefetches:
    """All that were ordered and not taken."""

    def __init__(self, pool: BlockPool, reservations: Reservations, restorer: KvRestorer) -> None:
        self._pool = pool
        self._reservations = reservations
        self._restorer = restorer
        self._waiting: dict[Key, Prefetch] = {}
        self._leaving: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._leaving)

    def start(self, work: Work, handle: KvHandle) -> None:
        """Begin, unless KV for this worker is better fetched at once when it is complete."""
        if self._restorer.may_follow and work.key not in self._waiting:
            self._waiting[work.key] = Prefetch(work, handle, self._reservations, self._restorer)

    async def fetch(self, sequence: DecodeSequence) -> Started | None:
        """Give the sequence its blocks with its KV in them, fetching what did not come before. None if there
        is no KV of it, or only that of its beginning.

        Raises NO_MEMORY_FIT_NOW and what `KvRestorer.restore` raises; the sequence keeps its blocks.
        """
        if sequence.handle is None:
            sequence.blocks = await self._reservations.take(sequence.work)
            sequence.num_computed = self._pool.num_shared(*sequence.work.key) * self._pool.block_size
            await self._restorer.restore_beginning(sequence)
            return None
        prefetch = await self._join(sequence.work)
        if prefetch is None or not prefetch.blocks:
            sequence.blocks = await self._reservations.take(sequence.work)
            return await self._restorer.restore(sequence)
        sequence.blocks = prefetch.blocks
        has_kv = prefetch.handle == sequence.handle
        started = await self._restorer.restore(sequence, has_kv=has_kv)
        return replace(started, prefetch_ns=prefetch.placing_ns if has_kv else 0)

    async def _join(self, work: Work) -> Prefetch | None:
        """The prefetch of this request, with its end awaited; its blocks are the caller's from here on."""
        prefetch = self._waiting.get(work.key)
        if prefetch is None:
            return None
        try:
            await asyncio.wait({prefetch.task})
        except asyncio.CancelledError:
            self.give_up(work.key)
            raise
        return self._waiting.pop(work.key, None)

    def give_up(self, key: Key) -> None:
        """Nobody will decode this: its blocks are free after the last write into them."""
        if prefetch := self._waiting.pop(key, None):
            task = asyncio.get_running_loop().create_task(self._leave(key, prefetch))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    async def stop(self) -> None:
        """Give up all of them, and wait."""
        for key in list(self._waiting):
            self.give_up(key)
        while self._leaving:
            await asyncio.wait(self._leaving)

    async def _leave(self, key: Key, prefetch: Prefetch) -> None:
        prefetch.task.cancel()
        with suppress(asyncio.CancelledError):
            await prefetch.task
        if prefetch.blocks:
            self._pool.release(key[0], generation=key[1])
            self._reservations.note_freed()
