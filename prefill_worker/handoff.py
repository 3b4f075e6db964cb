"""Sends a prompt's KV to the store while the rest of the prompt is still being computed.

One `Handoff` per prompt, living on the event loop. The compute thread says how many tokens are done;
full blocks leave at once, the last one when the prompt is complete. The blocks stay in the pool under
a hold of their own until the store has them, whatever happens to the request meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvstore.client import KvClient
from kvstore.key import KvHandle, object_id_of
from kvstore.records import ChunkRange, ObjectHeader
from kvstore.writer import KvWriter
from prefill_worker.job import PrefillJob
from tandem.config import ClusterConfig
from tandem.engine.block_pool import BlockPool
from tandem.engine.kv_export import export_kv
from tandem.engine.loading import Engine
from tandem.engine.paged_cache import PagedCache
from tandem.errors import Internal, TandemError
from tandem.geometry import num_blocks
from tandem.threads import to_thread_to_end

log = logging.getLogger(__name__)
HOLD = "handoff"


@dataclass(frozen=True, slots=True)
class HandoffContext:
    """What all hand-offs of a worker share."""

    client: KvClient
    cache: PagedCache
    pool: BlockPool
    dtype: str
    fingerprint: bytes
    chunk_bytes: int

    @classmethod
    def of(
        cls, config: ClusterConfig, engine: Engine, client: KvClient, fingerprint: bytes
    ) -> HandoffContext:
        return cls(
            client,
            engine.model.cache,
            engine.pool,
            config.model.dtype,
            fingerprint,
            config.kvstore.chunk_bytes,
        )

    def header(self, job: PrefillJob) -> ObjectHeader:
        """The stored object's description: whole blocks, all layers."""
        blocks = num_blocks(job.num_tokens, self.cache.block_size)
        return ObjectHeader(
            object_id=object_id_of("", job.work.request_id),
            epoch=job.work.epoch,
            tenant="",
            fingerprint=self.fingerprint,
            dtype=self.dtype,
            num_layers=self.cache.geometry.num_layers,
            num_tokens=job.num_tokens,
            block_size=self.cache.block_size,
            num_blocks=blocks,
            total_bytes=blocks * self.cache.block_bytes,
        )

    def parts(self, start: int, end: int) -> list[ChunkRange]:
        """Blocks [start, end) of all layers in parts of at most the chunk size, but of a block at least
        one layer."""
        num_layers = self.cache.geometry.num_layers
        blocks = max(1, self.chunk_bytes // self.cache.block_bytes)
        layers = min(num_layers, max(1, self.chunk_bytes * num_layers // self.cache.block_bytes))
        return [
            ChunkRange(
                block_start=first,
                num_blocks=min(blocks, end - first),
                layer_start=layer,
                num_layers=min(layers, num_layers - layer),
            )
            for first in range(start, end, blocks)
            for layer in range(0, num_layers, layers)
        ]


async def release_handle(client: KvClient, handle: KvHandle) -> None:
    """Give up a sealed object that nobody will fetch. What a lost store misses, the lease frees."""
    try:
        await client.release(handle)
    except TandemError as error:
        log.warning("could not release stored KV: %s", error.reason)


class Handoff:
    """The KV of one prompt on its way out. Lives on the event loop; its end releases `HOLD` on the blocks."""

    def __init__(
        self,
        context: HandoffContext,
        job: PrefillJob,
        blocks: Sequence[int],
        on_end: Callable[[PrefillJob], None],
    ) -> None:
        self._context = context
        self._job = job
        self._blocks = blocks
        self._on_end = on_end
        self._progress: asyncio.Queue[int | None] = asyncio.Queue()  # tokens computed; None: give up
        self._task = asyncio.get_running_loop().create_task(self._run())

    def advance(self, num_computed: int) -> None:
        """The KV of the first `num_computed` tokens is in the cache."""
        self._progress.put_nowait(num_computed)

    def give_up(self) -> None:
        """Nobody needs this KV: the store forgets it."""
        self._job.is_cancelled = True
        self._progress.put_nowait(None)

    async def wait(self) -> None:
        """Until the hand-off has ended, one way or the other."""
        await asyncio.wait({self._task})

    async def _run(self) -> None:
        work = self._job.work
        try:
            self._job.handle = await self._send()
            if self._job.handle is not None and self._job.is_cancelled:
                await release_handle(self._context.client, self._job.handle)  # too late to forget it
            elif self._job.handle is not None:
                self._job.emit(self._job.handle)
        except TandemError as error:
            self._fail(error)
        except Exception:
            bug = Internal.bug()
            log.exception("hand-off of %s failed (%s)", work.request_id, bug.error_id)
            self._fail(bug)
        finally:
            self._context.pool.release(work.request_id, generation=work.epoch, hold=HOLD)
            self._on_end(self._job)

    def _fail(self, error: TandemError) -> None:
        """Without its KV the prompt is of no use: what is left of it is not computed."""
        if not self._job.is_cancelled:
            self._job.emit(error)
        self._job.is_cancelled = True

    async def _send(self) -> KvHandle | None:
        """Send blocks as they become complete, then seal. None if the hand-off was given up."""
        num_sent = 0
        num_computed = await self._progress.get()
        if num_computed is None:
            return None
        async with self._context.client.put(self._context.header(self._job)) as writer:
            while num_computed is not None:
                num_ready = self._num_ready(num_computed)
                for part in self._context.parts(num_sent, num_ready):
                    if self._job.is_cancelled:
                        return None
                    await self._send_part(writer, part)
                num_sent = num_ready
                if num_sent == len(self._blocks):
                    return await writer.seal()
                num_computed = await self._progress.get()
        return None

    def _num_ready(self, num_computed: int) -> int:
        """Blocks that will not change any more."""
        if num_computed == self._job.num_tokens:
            return len(self._blocks)
        return num_computed // self._context.cache.block_size

    async def _send_part(self, writer: KvWriter, part: ChunkRange) -> None:
        cache = self._context.cache
        last = part.block_start + part.num_blocks
        num_tokens = min(self._job.num_tokens, last * cache.block_size) - part.block_start * cache.block_size
        blocks = self._blocks[part.block_start : last]
        payload = await to_thread_to_end(
            export_kv, cache, blocks, num_tokens, part.layer_start, part.num_layers
        )
        await writer.write(part, payload)
