"""The run of a queue in Redis by its owner, who works on it like every other runner."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from tandem.offline.progress import Progress
from tandem.offline.runner import Runner
from tandem.offline.shared.owner import Owner
from tandem.offline.shared.runner import SharedRunner


@dataclass(frozen=True, slots=True)
class OwnedRun:
    """Ends when every line has its record in the owner's files, or within the grace of `stop`."""

    owner: Owner
    runner: Runner
    shared: SharedRunner

    @property
    def progress(self) -> Progress:
        """Of all runners together."""
        return self.owner.progress

    @property
    def stop(self) -> asyncio.Event:
        return self.runner.stop

    async def run(self) -> None:
        """Raises what `Owner.run` and `Runner.run` do."""
        async with self.shared:
            owning = asyncio.create_task(self.owner.run())
            running = asyncio.create_task(self.runner.run())
            try:
                await asyncio.wait({owning, running}, return_when=asyncio.FIRST_COMPLETED)
                if running.done() and not self.stop.is_set():  # the queue has ended: the owner knows how
                    await asyncio.wait({owning})
            finally:
                self.stop.set()
                owning.cancel()
                await asyncio.wait({owning, running})
            running.result()
            if not owning.cancelled():
                owning.result()
