"""Beginnings of prompts that were computed before: found in the store, placed in blocks, published.

A beginning is cached in pieces of whole blocks, each an object named by all tokens up to its end
(kvstore/chain.py). Chunks of a prompt are computed to the same bits wherever they are cut, so a restored
piece changes no token. The last token of a prompt is always computed: the next one comes from it.

Whatever fails here costs time and nothing else: the worker computes what it could not get. Lives on the
event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from kvstore.chain import piece_names
from kvstore.client import KvClient
from kvstore.key import KvHandle
from kvstore.records import ObjectHeader
from prefill_worker.job import PrefillJob
from prefill_worker.sender import Format, export_part, parts_of
from tandem.engine.paged_cache import PagedCache
from tandem.errors import FailedPrecondition, TandemError
from tandem.threads import to_thread_to_end

log = logging.getLogger(__name__)
FIND_S = 0.25
RESTORE_S = 2.0  # what is not here by then is computed
AT_ONCE = 8  # pieces of one prompt on their way


@dataclass(slots=True)
class PrefixStats:
    """What looking for prefixes brought so far."""

    num_prompts: int = 0  # that are long enough to look for
    num_hits: int = 0  # prompts of which something was restored
    num_tokens: int = 0  # restored and not computed
    num_bytes: int = 0
    restore_s: float = 0.0
    num_published: int = 0  # pieces
    num_failures: int = 0  # finding, restoring or publishing that ended early


class PrefixCache:
    """One worker's use of the prefixes in the store."""

    def __init__(self, client: KvClient, cache: PagedCache, form: Format, piece_tokens: int) -> None:
        self.stats = PrefixStats()
        self._client = client
        self._cache = cache
        self._form = form
        self._piece_tokens = piece_tokens
        self._salts: dict[str, bytes] = {}  # by tenant; another one means that the store started again
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def num_running(self) -> int:
        return len(self._tasks)

    def may_help(self, job: PrefillJob) -> bool:
        return job.num_tokens > self._piece_tokens

    def start_find(self, job: PrefillJob, then: Callable[[PrefillJob], None]) -> None:
        """Look for the longest cached beginning, then go on."""
        self._start(self._find(job), job, then)

    def start_restore(self, job: PrefillJob, then: Callable[[PrefillJob], None]) -> None:
        """Place what was found in the job's blocks, as far as it goes, then go on."""
        self._start(self._restore(job), job, then)

    async def stop(self) -> None:
        """Wait for what was started."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def publish(self, job: PrefillJob, blocks: Sequence[int]) -> None:
        """Store the pieces of a computed prompt that the store does not have. `blocks` hold its KV."""
        try:
            names, known = await self._look_up(job, job.num_tokens)
            for place in range(len(known), len(names)):
                await self._publish_piece(job.work.tenant, names[place], self._blocks_of(place, blocks))
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
        self.stats.num_prompts += 1
        try:
            async with asyncio.timeout(FIND_S):
                _, job.pieces = await self._look_up(job, job.num_tokens - 1)
        except (TandemError, TimeoutError) as error:
            self._note("find", error)

    async def _look_up(self, job: PrefillJob, num_tokens: int) -> tuple[list[bytes], list[KvHandle]]:
        """Names of the whole pieces of that many tokens, and handles of the first ones that are cached."""
        tenant, fingerprint = job.work.tenant, self._form.fingerprint
        if tenant not in self._salts:
            _, self._salts[tenant] = await self._client.find((), fingerprint, tenant)
        salt = self._salts[tenant]
        names = piece_names(job.work.token_ids[:num_tokens], self._piece_tokens, fingerprint, salt)
        handles, self._salts[tenant] = await self._client.find(names, fingerprint, tenant)
        if self._salts[tenant] != salt:  # names of an earlier life of the store: nothing is there
            return await self._look_up(job, num_tokens)
        return names, handles

    async def _restore(self, job: PrefillJob) -> None:
        started_s = time.monotonic()
        is_restored = [False] * len(job.pieces)
        some = asyncio.Semaphore(AT_ONCE)

        async def restore(place: int, handle: KvHandle) -> None:
            async with some:
                if not job.is_cancelled:
                    await self._restore_piece(job, handle, self._blocks_of(place, job.blocks))
                    is_restored[place] = True

        try:
            async with asyncio.timeout(RESTORE_S), asyncio.TaskGroup() as group:
                for place, handle in enumerate(job.pieces):
                    group.create_task(restore(place, handle))
        except* (TandemError, TimeoutError) as errors:
            self._note("restore", errors.exceptions[0])
        finally:
            num_pieces = [*is_restored, False].index(False)  # up to the first that is missing
            self._count(job, num_pieces, time.monotonic() - started_s)

    def _count(self, job: PrefillJob, num_pieces: int, seconds: float) -> None:
        job.num_computed = job.num_cached = num_pieces * self._piece_tokens
        if job.num_cached:
            job.has_draft_kv = False  # a draft model has not read these tokens
            self.stats.num_hits += 1
        self.stats.num_tokens += job.num_cached
        self.stats.num_bytes += sum(handle.num_bytes for handle in job.pieces[:num_pieces])
        self.stats.restore_s += seconds

    async def _restore_piece(self, job: PrefillJob, handle: KvHandle, blocks: Sequence[int]) -> None:
        """A piece counts only when all of it was checked; until then its blocks are as good as empty."""
        holder = f"prefill/{job.work.request_id}/{job.work.epoch}"
        async with aclosing(self._client.get(handle, holder, tenant=job.work.tenant)) as chunks:
            async for chunk, payload in chunks:
                chosen = blocks[chunk.block_start : chunk.block_start + chunk.num_blocks]
                await to_thread_to_end(
                    self._cache.write_blocks, chosen, payload, chunk.layer_start, chunk.num_layers
                )

    async def _publish_piece(self, tenant: str, name: bytes, blocks: Sequence[int]) -> None:
        try:
            async with self._client.put(self._header(tenant, name)) as writer:
                for part in parts_of(self._cache, self._form.chunk_bytes, 0, len(blocks)):
                    payload = await export_part(self._cache, blocks, self._piece_tokens, part)
                    await writer.write(part, payload)
                await writer.seal()
            self.stats.num_published += 1
        except FailedPrecondition:
            pass  # another worker publishes the same piece just now

    def _header(self, tenant: str, name: bytes) -> ObjectHeader:
        cache = self._cache
        num_blocks = self._piece_tokens // cache.block_size
        return ObjectHeader(
            object_id=name,
            epoch=0,
            tenant=tenant,
            fingerprint=self._form.fingerprint,
            dtype=self._form.dtype,
            num_layers=cache.geometry.num_layers,
            num_tokens=self._piece_tokens,
            block_size=cache.block_size,
            num_blocks=num_blocks,
            total_bytes=num_blocks * cache.block_bytes,
            is_prefix=1,
        )

    def _blocks_of(self, place: int, blocks: Sequence[int]) -> Sequence[int]:
        size = self._piece_tokens // self._cache.block_size
        return blocks[place * size : (place + 1) * size]

    def _note(self, what: str, error: Exception) -> None:
        self.stats.num_failures += 1
        log.info("could not %s a prefix: %s", what, getattr(error, "reason", type(error).__name__))
