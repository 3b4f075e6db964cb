"""The owner's side of a queue in Redis: lines from its file into Redis, records from Redis into its files.

The files remain the only book. When the owner comes back after a crash, the records that lie in Redis
are collected first; a line that Redis calls done without a record anywhere is offered again.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from tandem.errors import ConfigError
from tandem.offline import members
from tandem.offline.lines import BadLine, Entry
from tandem.offline.progress import Progress
from tandem.offline.results import Results
from tandem.offline.shared.patience import Patience
from tandem.offline.shared.queue import SharedQueue, SharedRecord
from tandem.offline.source import Source

MAX_OPEN = 1024  # lines that lie in Redis at once
COLLECTED = 256  # records at once
LOOK_EVERY_S = 1.0


@dataclass(slots=True)
class Owner:
    """Runs until every line has its record in `results`."""

    queue: SharedQueue
    source: Source
    results: Results
    progress: Progress
    patience: Patience
    _collected: asyncio.Event = field(default_factory=asyncio.Event)
    _collecting: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def run(self) -> None:
        """Raises `StorageError`, `Unavailable`, and `ConfigError` if the queue is no longer there."""
        await self._reopen_lost()
        collecting = asyncio.create_task(self._collect_all())
        tasks = {collecting, asyncio.create_task(self._offer_all()), asyncio.create_task(self._look())}
        try:
            while not collecting.done():
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
                tasks -= done
        finally:
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
        await self.patience.call(self.queue.end, "finished")

    async def _collect_all(self) -> None:
        while self.results.finished.count < self.progress.total:
            await self._collect(block=True)

    async def _offer_all(self) -> None:
        async for chunk in self.source.chunks():
            while await self.patience.call(self.queue.num_open) >= MAX_OPEN:
                self._collected.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._collected.wait(), LOOK_EVERY_S)
            await self.patience.call(self.queue.offer, [e for _, e in chunk if isinstance(e, Entry)])
            for line, found in chunk:
                if isinstance(found, BadLine):
                    await self.results.add(line, members.of_bad_line(line, found), is_failure=True)
                    self.progress.note(0, is_failure=True)

    async def _collect(self, *, block: bool) -> int:
        """Move some records into the files; how many there were."""
        async with self._collecting:
            return await self._collect_alone(block=block)

    async def _collect_alone(self, *, block: bool) -> int:
        records = await self.patience.call(self.queue.records, COLLECTED, block=block)
        fresh = {record.line: record for record in records if record.line not in self.results.finished}
        await asyncio.gather(*(self._keep(record) for record in fresh.values()))
        if records:
            await self.patience.call(self.queue.drop_records, [record.id for record in records])
            self._collected.set()
        return len(records)

    async def _collect_rest(self) -> None:
        while await self._collect(block=False):
            pass

    async def _keep(self, record: SharedRecord) -> None:
        await self.results.add(record.line, record.members, is_failure=record.is_failure)
        body = (record.members["response"] or {}).get("body", {})
        tokens = body.get("usage", {}).get("completion_tokens", 0)
        self.progress.note(tokens, is_failure=record.is_failure)

    async def _reopen_lost(self) -> None:
        """What was done before now has its record in Redis or in the files, or else nowhere."""
        bits = await self.patience.call(self.queue.done_bits)
        await self._collect_rest()
        done = np.flatnonzero(np.unpackbits(np.frombuffer(bits, np.uint8)))
        lost = [int(line) for line in done if int(line) not in self.results.finished]
        for begin in range(0, len(lost), MAX_OPEN):
            await self.patience.call(self.queue.reopen, lost[begin : begin + MAX_OPEN])

    async def _look(self) -> None:
        """How many lines are in flight; and that somebody can still work on them."""
        while True:
            job = await self.patience.call(self.queue.job)
            if not job:
                raise ConfigError(f"the queue {self.queue.name} is no longer in Redis; resume it")
            if "ended" in job:
                await self._collect_rest()
                raise ConfigError(f"the queue {self.queue.name} was {job['ended']}")
            self.progress.in_flight = await self.patience.call(self.queue.num_held)
            await asyncio.sleep(LOOK_EVERY_S)
