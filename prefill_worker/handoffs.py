"""All hand-offs of a worker. Lives on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from prefill_worker.handoff import Handoff, HandoffContext, release_handle
from prefill_worker.job import PrefillJob


class Handoffs:
    """Starts them, tells them what is computed, waits for them. `on_end` hears that one has ended."""

    def __init__(self, context: HandoffContext, on_end: Callable[[], None]) -> None:
        self._context = context
        self._on_end = on_end
        self._running: dict[PrefillJob, Handoff] = {}
        self._releases: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._running)

    def start(self, job: PrefillJob, blocks: tuple[int, ...]) -> None:
        """Send the KV in these blocks, which carry a hold of the hand-off's own."""
        self._running[job] = Handoff(self._context, job, blocks, self._ended)

    def advance(self, job: PrefillJob, num_computed: int) -> None:
        if job in self._running:
            self._running[job].advance(num_computed)

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
