"""Beginnings of prompts that were computed before: found in the store, placed in blocks, published.

A beginning is cached in pieces of whole blocks, each an object named by all tokens up to its end
(kvstore/chain.py). Chunks of a prompt are computed to the same bits wherever they are cut, so a restored
piece changes no token. What the worker's own store lacks may be in another one. The last token of a prompt is
always computed: the next one comes from it.

Whatever fails here costs time and nothing else: the worker computes what it could not get. Lives on the
event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, cast

from kvstore.client import KvClient
from kvstore.elsewhere import Elsewhere, PieceElsewhere
from kvstore.key import KvHandle
from kvstore.pieces import Pieces
from prefill_worker.job import PrefillJob
from prefill_worker.sender import export_part
from tandem.engine.paged_cache import PagedCache
from tandem.errors import TandemError
from tandem.prefix_usage import PrefixHit
from tandem.threads import to_thread_to_end

log = logging.getLogger(__name__)
FIND_S = 0.25
RESTORE_S = 2.0  # what is not here by then is computed
AT_ONCE = 8  # pieces of one prompt on their way


class PrefixCache:
    """One worker's use of the prefixes in its store, and in those `elsewhere`."""

    def __init__(
        self, client: KvClient, cache: PagedCache, pieces: Pieces, elsewhere: Elsewhere | None = None
    ) -> None:
        self.report = pieces.report
        self._elsewhere = elsewhere
        self._client = client
        self._cache = cache
        self._pieces = pieces
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def num_running(self) -> int:
        return len(self._tasks)

    def may_help(self, job: PrefillJob) -> bool:
        return job.num_tokens > self._pieces.form.tokens

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
        if self._elsewhere is not None:
            await self._elsewhere.close()

    async def publish(self, job: PrefillJob, blocks: Sequence[int]) -> None:
        """Store the pieces of a computed prompt that the store does not have. `blocks` hold its KV."""
        work, export = job.work, partial(export_part, self._cache, blocks, job.num_tokens)
        try:
            await self._pieces.publish(work.tenant, work.token_ids, export)
        except TandemError as error:
            self._note("publish", error)

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
        self.report.num_prompts += 1
        tenant, token_ids = job.work.tenant, job.work.token_ids[:-1]
        try:
            async with asyncio.timeout(FIND_S):
                names, handles = await self._pieces.look_up(tenant, token_ids)
        except (TandemError, TimeoutError) as error:
            self._note("find", error)
            return
        job.pieces = handles
        if self._elsewhere is not None and len(handles) < len(names):
            job.pieces = [*handles, *await self._elsewhere.find(tenant, names[len(handles) :])]

    async def _restore(self, job: PrefillJob, token_s: float) -> None:
        started_s = time.monotonic()
        is_restored = [False] * len(job.pieces)
        some = asyncio.Semaphore(AT_ONCE)

        async def restore(place: int, piece: KvHandle | PieceElsewhere) -> None:
            async with some:
                if not job.is_cancelled:
                    blocks = self._pieces.blocks_of(place, job.blocks)
                    is_restored[place] = await self._restore_piece(job, piece, blocks)

        try:
            async with asyncio.timeout(RESTORE_S), asyncio.TaskGroup() as group:
                for place, piece in enumerate(job.pieces):
                    group.create_task(restore(place, piece))
        except* (TandemError, TimeoutError) as errors:
            self._note("restore", errors.exceptions[0])
        finally:
            num_pieces = [*is_restored, False].index(False)  # up to the first that is missing
            self._count(job, num_pieces, time.monotonic() - started_s, token_s)

    def _count(self, job: PrefillJob, num_pieces: int, restore_s: float, token_s: float) -> None:
        form, report = self._pieces.form, self.report
        num_tokens, num_bytes = num_pieces * form.tokens, num_pieces * form.num_bytes
        saved_s = num_tokens * token_s - restore_s
        job.num_computed = num_tokens
        job.hit = PrefixHit(min(num_tokens, job.work.num_prompt_tokens), num_bytes, saved_s)
        if num_tokens:
            job.has_draft_kv = False  # a draft model has not read these tokens
            report.num_hits += 1
        report.num_tokens += num_tokens
        report.num_bytes += num_bytes
        report.restore_s += restore_s
        report.saved_s += saved_s

    async def _restore_piece(
        self, job: PrefillJob, piece: KvHandle | PieceElsewhere, blocks: Sequence[int]
    ) -> bool:
        """A piece counts only when all of it was checked; until then its blocks are as good as empty. False
        if a store that the index named could not give it, which is no reason to give up others."""
        if self._elsewhere is None or isinstance(piece, KvHandle):
            await self._place(job, self._client, cast(KvHandle, piece), blocks)
            return True
        try:
            await self._place(job, self._elsewhere.store(piece), piece.handle, blocks)
        except TandemError as error:
            self._elsewhere.note_missing(piece, error)
            return False
        self.report.num_elsewhere += 1
        return True

    async def _place(self, job: PrefillJob, store: KvClient, handle: KvHandle, blocks: Sequence[int]) -> None:
        holder = f"prefill/{job.work.request_id}/{job.work.epoch}"
        async with aclosing(store.get(handle, holder, tenant=job.work.tenant)) as chunks:
            async for chunk, payload in chunks:
                chosen = blocks[chunk.block_start : chunk.block_start + chunk.num_blocks]
                await to_thread_to_end(
                    self._cache.write_blocks, chosen, payload, chunk.layer_start, chunk.num_layers
                )

    def _note(self, what: str, error: Exception) -> None:
        self.report.num_failures += 1
        log.info("could not %s a prefix: %s", what, getattr(error, "reason", type(error).__name__))
