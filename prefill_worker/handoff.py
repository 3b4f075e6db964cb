"""Sends a prompt's KV to the store while the rest of the prompt is still being computed.

One `Handoff` per prompt, living on the event loop. The compute thread says how many tokens are done;
full blocks leave at once, the last one when the prompt is complete. Those of a long chunk leave layer by
layer while the chunk is computed. Where the forward has all cores they leave right after it, as whoever takes
a core from a team of threads makes all of them wait; only the way is opened meanwhile. The blocks stay in the
pool under a hold of their own until the store has them, whatever happens to the request meanwhile.

When the object is sealed, the pieces of the prompt's beginning are published for others
(prefill_worker/prefixes.py). A draft model's KV goes beside it as an object of its own; what goes wrong
with that costs the decode worker the time to read the prompt for its draft, and nobody else anything.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kvstore.client import KvClient
from kvstore.elsewhere import Elsewhere
from kvstore.key import KvHandle
from kvstore.pieces import PieceFormat, Pieces
from kvstore.prefix_reader import PrefixReader
from prefill_worker.job import KvOpened, PrefillJob
from prefill_worker.link_codec import LinkCodec
from prefill_worker.prefixes import PrefixCache
from prefill_worker.sender import DraftSender, Format, ObjectSender
from tandem.config import ClusterConfig
from tandem.engine.block_pool import BlockPool
from tandem.engine.loading import Engine
from tandem.engine.paged_cache import PagedCache
from tandem.errors import Internal, TandemError

log = logging.getLogger(__name__)
HOLD = "handoff"
POLL_S = 0.002  # between two looks at the layers of a running forward


@dataclass(frozen=True, slots=True)
class HandoffContext:
    """What all hand-offs of a worker share."""

    client: KvClient
    cache: PagedCache
    pool: BlockPool
    form: Format
    overlap_bytes: int = 0  # chunks with so much KV leave while they are computed; 0: none do
    is_beside: bool = True  # False: forwards need all cores, and KV that is complete leaves between them
    draft_cache: PagedCache | None = None
    prefixes: PrefixCache | None = None

    @classmethod
    def of(
        cls, config: ClusterConfig, engine: Engine, client: KvClient, fingerprint: bytes
    ) -> HandoffContext:
        cache, draft_cache = engine.model.cache, engine.draft.cache if engine.draft else None
        wire_dtype = config.kv_dtypes.wire
        form = Format(
            dtype=wire_dtype,
            fingerprint=fingerprint,
            chunk_bytes=config.kvstore.chunk_bytes,
            codec=LinkCodec.of(config.kvstore.codec, cache, wire_dtype),
        )
        is_beside = config.kvstore.overlap == "always" or config.cores.claims is None
        overlap, kept = config.kvstore.overlap_bytes, None
        if config.cache.prefix_bytes > 0:
            pieces = Pieces(client, PieceFormat.of(config, cache.geometry, fingerprint))
            reader = PrefixReader(client, pieces, Elsewhere.of(config, pieces))
            kept = PrefixCache(cache, pieces, reader)
        return cls(client, cache, engine.pool, form, overlap, is_beside, draft_cache, kept)


async def release_handle(client: KvClient, handle: KvHandle) -> None:
    """Give up sealed objects that nobody will fetch. What a lost store misses, the lease frees."""
    try:
        for each in handle.objects:
            await client.release(each)
    except TandemError as error:
        log.warning("could not release stored KV: %s", error.reason)


@dataclass(frozen=True, slots=True)
class Step:
    """The KV of the first tokens is in the cache, or a forward is under way that puts it there."""

    num_tokens: int
    is_under_way: bool = False


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
        self._steps: asyncio.Queue[Step | None] = asyncio.Queue()  # None: give up
        self._task = asyncio.get_running_loop().create_task(self._run())

    def advance(self, step: Step) -> None:
        """What the compute thread has done, or is about to do with `layers_written` of the cache at 0."""
        self._steps.put_nowait(step)

    def give_up(self) -> None:
        """Nobody needs this KV: the store forgets it."""
        self._job.is_cancelled = True
        self._steps.put_nowait(None)

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
                if self._context.prefixes is not None:
                    await self._context.prefixes.publish(self._job, self._blocks)
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
        step = await self._steps.get()
        if step is None:
            return None
        context, blocks = self._context, self._blocks
        ends = context.client, context.form, self._job
        async with (
            ObjectSender(*ends, context.cache, blocks) as target,
            DraftSender(*ends, context.draft_cache, blocks) as draft,
        ):
            if step != Step(self._job.num_tokens) and self._job.num_left:
                self._job.emit(KvOpened(target.handle))
            while step is not None:
                num_ready = self._num_ready(step.num_tokens)
                if step.is_under_way:
                    await self._send_layers(target, num_ready)
                else:
                    await target.send(num_ready)
                    await draft.send(num_ready)
                if self._job.is_cancelled:
                    return None
                if num_ready == len(blocks) and not step.is_under_way:
                    return replace(await target.seal(), draft=await draft.seal())
                step = await self._steps.get()
        return None

    async def _send_layers(self, target: ObjectSender, num_ready: int) -> None:
        """Blocks that a forward is filling, in the layers it has done, until it is over. Messages that are
        not full would cost that forward more than they save."""
        cache, num_sent = self._context.cache, 0
        enough = target.layers_in_part(num_ready)
        while self._steps.empty() and num_sent < cache.geometry.num_layers:
            num_written = cache.layers_written
            if num_written - num_sent >= enough:
                await target.send(num_ready, num_written)
                num_sent = num_written
            else:
                await asyncio.sleep(POLL_S)

    def _num_ready(self, num_computed: int) -> int:
        """Blocks that will not change any more."""
        if num_computed == self._job.num_tokens:
            return len(self._blocks)
        return num_computed // self._context.cache.block_size
