"""Beginnings of prompts that were computed before: placed in a job's blocks, and published for others.

How they are found and fetched is kvstore/prefix_reader.py. The last token of a prompt is always computed: the
next one comes from it. Lives on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from kvstore.key import Buffer
from kvstore.pieces import Pieces
from kvstore.prefix_reader import PrefixReader, Wanted
from kvstore.records import ChunkHeader, ChunkRange
from prefill_worker.job import PrefillJob
from prefill_worker.sender import export_part
from tandem.engine.paged_cache import PagedCache
from tandem.errors import TandemError
from tandem.threads import to_thread_to_end

log = logging.getLogger(__name__)


class PrefixCache:
    """One worker's use of the prefixes in the stores."""

    def __init__(self, cache: PagedCache, pieces: Pieces, reader: PrefixReader) -> None:
        self.report = pieces.report
        self._cache = cache
        self._pieces = pieces
        self._reader = reader
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def num_running(self) -> int:
        return len(self._tasks)

    def may_help(self, job: PrefillJob) -> bool:
        return self._reader.may_help(job.num_tokens)

    def start_find(self, job: PrefillJob, then: Callable[[PrefillJob], None]) -> None:
        """Look for the longest cached beginning, then go on."""
        self._start(self._find(job), job, then)

    def start_restore(
        self, job: PrefillJob, then: Callable[[PrefillJob], None], token_s: float = 0.0
    ) -> None:
        """Place what was found in the job's blocks, as far as it goes, then go on. A token that is not
        computed saves `token_s`."""
        self._start(self._restore(job, token_s), job, then)

    async def stop(self) -> None:
        """Wait for what was started."""
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self._reader.close()

    async def publish(self, job: PrefillJob, blocks: Sequence[int]) -> None:
        """Store the pieces of a computed prompt that the store does not have. `blocks` hold its KV."""
        work, computed = job.work, (self._cache, blocks, job.num_tokens)

        async def export(part: ChunkRange) -> Buffer:
            return await to_thread_to_end(export_part, *computed, part)

        try:
            await self._pieces.publish(work.tenant, work.token_ids, export)
        except TandemError as error:
            self._reader.note("publish", error)

    def _start(
        self, work: Coroutine[Any, Any, None], job: PrefillJob, then: Callable[[PrefillJob], None]
    ) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)

        def end(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and task.exception() is not None:
                log.error("looking for a prefix failed", exc_info=task.exception())
            then(job)

        task.add_done_callback(end)

    async def _find(self, job: PrefillJob) -> None:
        job.pieces = await self._reader.find(job.work.tenant, job.work.token_ids[:-1])

    async def _restore(self, job: PrefillJob, token_s: float) -> None:
        began_s, work = time.monotonic(), job.work

        async def place(number: int, chunk: ChunkHeader, payload: memoryview) -> None:
            blocks = self._pieces.blocks_of(number, job.blocks)
            chosen = blocks[chunk.block_start : chunk.block_start + chunk.num_blocks]
            await to_thread_to_end(
                self._cache.write_blocks, chosen, payload, chunk.layer_start, chunk.num_layers
            )

        holder = f"prefill/{work.request_id}/{work.epoch}"
        wanted = Wanted(work.tenant, holder, place, lambda: not job.is_cancelled)
        num_pieces = await self._reader.fetch(job.pieces, wanted)
        job.num_computed = num_pieces * self._pieces.form.tokens
        job.hit = self._reader.count(num_pieces, work.num_prompt_tokens, began_s, token_s)
        if num_pieces:
            job.has_draft_kv = False  # a draft model has not read these tokens
