"""All hand-offs of a worker: told by the compute thread what is done, running on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from prefill_worker.handoff import HOLD, Handoff, HandoffContext, Step, release_handle
from prefill_worker.job import PrefillJob
from prefill_worker.runner import Chunk


class Handoffs:
    """Starts them, tells them what is computed, waits for them. `on_end` hears that one has ended."""

    def __init__(self, context: HandoffContext, on_end: Callable[[], None]) -> None:
        self._context = context
        self._on_end = on_end
        self._running: dict[PrefillJob, Handoff] = {}
        self._releases: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()

    def __len__(self) -> int:
        return len(self._running)

    # --- compute thread ---

    def begin(self, chunks: Sequence[Chunk]) -> None:
        """A forward over these chunks is next: the long ones leave while it runs, or find the way open."""
        leaving = [chunk for chunk in chunks if self._leaves_early(chunk)]
        if leaving and self._context.is_beside:
            self._context.cache.layers_written = 0
        for chunk in leaving:
            job, done = chunk.job, chunk.job.num_computed
            if self._context.is_beside:
                self._tell(job, Step(done + chunk.num_tokens, is_under_way=True))
            elif not job.is_handed_off:
                self._tell(job, Step(done))

    def advance(self, job: PrefillJob) -> None:
        """What is computed of the prompt may leave."""
        self._tell(job, Step(job.num_computed))

    def give_up_soon(self, job: PrefillJob) -> None:
        self._loop.call_soon_threadsafe(self.give_up, job)

    def _leaves_early(self, chunk: Chunk) -> bool:
        """A prompt that ends with its first token needs no KV at all."""
        least, work, cache = self._context.overlap_bytes, chunk.job.work, self._context.cache
        num_bytes = chunk.num_tokens * cache.block_bytes // cache.block_size
        return 0 < least <= num_bytes and work.max_total_tokens > chunk.job.num_tokens + 1

    def _tell(self, job: PrefillJob, step: Step) -> None:
        if not job.is_handed_off:
            self._context.pool.hold(job.work.request_id, HOLD, generation=job.work.epoch)
            job.is_handed_off = True
            self._loop.call_soon_threadsafe(self._start, job, tuple(job.blocks))
        self._loop.call_soon_threadsafe(self._advance, job, step)

    # --- event loop ---

    def _start(self, job: PrefillJob, blocks: tuple[int, ...]) -> None:
        """Send the KV in these blocks, which carry a hold of the hand-off's own."""
        self._running[job] = Handoff(self._context, job, blocks, self._ended)

    def _advance(self, job: PrefillJob, step: Step) -> None:
        if job in self._running:
            self._running[job].advance(step)

    def give_up(self, job: PrefillJob) -> None:
        if job in self._running:
            self._running[job].give_up()

    def cancel(self, job: PrefillJob) -> None:
        """Nobody waits for the handle any more, even if it has been emitted."""
        self.give_up(job)
        if job.handle is not None:  # sealed, but perhaps never received
            task = asyncio.get_running_loop().create_task(release_handle(self._context.client, job.handle))
            self._releases.add(task)
            task.add_done_callback(self._releases.discard)

    async def stop(self) -> None:
        """Wait for those that can still complete; the others give up."""
        for job, handoff in list(self._running.items()):
            if job.num_left:
                handoff.give_up()
            await handoff.wait()
        if self._releases:
            await asyncio.wait(self._releases)

    def _ended(self, job: PrefillJob) -> None:
        del self._running[job]
        self._on_end()
