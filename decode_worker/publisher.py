"""Publishes what finished sequences leave behind, so that the next turn of a conversation starts warm.

A sequence that ended well has the KV of its prompt and of its output in its blocks. They stay under a hold
of their own while the whole pieces that the store does not have are put there (kvstore/pieces.py). That is
nobody else's cost: it happens off the step loop, for a few sequences at a time and a short time each, and
once a request waits for blocks all of it is given up. Only tokens that stand are published: the KV of
rejected draft tokens lies behind them, and that of the last token was never computed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from decode_worker.reuse import Reuse
from decode_worker.sequence import DecodeSequence
from kvstore.key import Buffer
from kvstore.pieces import Pieces
from kvstore.records import ChunkRange
from tandem.engine.block_pool import BlockPool
from tandem.engine.kv_transfer import export_kv
from tandem.engine.paged_cache import PagedCache
from tandem.errors import TandemError
from tandem.prefix_usage import PrefixReport
from tandem.threads import to_thread_to_end
from tandem.work import Work

log = logging.getLogger(__name__)
HOLD = "publish"
AT_ONCE = 2  # sequences on their way
MAX_HELD = 16  # with those that wait for their turn
PUBLISH_S = 2.0  # of each, its wait included


class Publisher:
    """One decode worker's finished sequences on their way, as far as `reuse` says that they are of use.

    `note_freed` hears, on the event loop, that blocks may have become free.
    """

    def __init__(
        self, reuse: Reuse, cache: PagedCache, pool: BlockPool, note_freed: Callable[[], None]
    ) -> None:
        self._reuse = reuse
        self._cache = cache
        self._pool = pool
        self._note_freed = note_freed
        self._some = asyncio.Semaphore(AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()

    def keep(self, sequence: DecodeSequence) -> None:
        """Name a finished sequence's blocks, hold them, and publish from them. Called by the step thread,
        before the request's own hold ends."""
        work, token_ids = sequence.work, sequence.token_ids[: sequence.num_computed]
        names, pieces = self._reuse.names, self._reuse.pieces
        if names is not None:
            self._pool.name(work.request_id, names.of(work, token_ids), generation=work.epoch)
        if pieces is not None and len(token_ids) >= pieces.form.tokens:
            self._pool.hold(work.request_id, HOLD, generation=work.epoch)
            self._loop.call_soon_threadsafe(self._start, pieces, work, token_ids, tuple(sequence.blocks))

    def give_up(self) -> None:
        """Somebody needs the blocks: all of them are free as soon as nothing reads them."""
        for task in self._tasks:
            task.cancel()

    async def stop(self) -> None:
        """Give up what is on its way, and wait for its end."""
        while self._tasks:
            self.give_up()
            await asyncio.wait(self._tasks)

    def _start(self, pieces: Pieces, work: Work, token_ids: Sequence[int], blocks: Sequence[int]) -> None:
        if len(self._tasks) >= MAX_HELD:
            pieces.report.num_given_up += 1
            self._release(work)
            return
        task = self._loop.create_task(self._publish(pieces, work, token_ids, blocks))
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._ended(pieces.report, work, task))

    def _ended(self, report: PrefixReport, work: Work, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._release(work)
        error = TimeoutError() if task.cancelled() else task.exception()
        if isinstance(error, TimeoutError):
            report.num_given_up += 1
        elif error is not None:
            report.num_failures += 1
            known = isinstance(error, TandemError)
            log.info("could not publish %s: %s", work.request_id, error, exc_info=None if known else error)

    def _release(self, work: Work) -> None:
        self._pool.release(work.request_id, generation=work.epoch, hold=HOLD)
        self._note_freed()

    async def _publish(
        self, pieces: Pieces, work: Work, token_ids: Sequence[int], blocks: Sequence[int]
    ) -> None:
        async def export(part: ChunkRange) -> Buffer:
            chosen = blocks[part.block_start : part.block_start + part.num_blocks]
            num_tokens = part.num_blocks * self._cache.block_size
            return await to_thread_to_end(
                export_kv, self._cache, chosen, num_tokens, part.layer_start, part.num_layers
            )

        async with asyncio.timeout(PUBLISH_S), self._some:
            await pieces.publish(work.tenant, token_ids, export)
