"""An owner or a runner of a queue in Redis as a process that tests kill; the service is a function.

python -m tests.tandem.offline.shared_process owner|runner URL NAME REQUESTS OUTPUT
"""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

from tandem.offline.census import take_census
from tandem.offline.lines import Entry, LineParser
from tandem.offline.members import Answer
from tandem.offline.progress import Progress
from tandem.offline.results import Results
from tandem.offline.runner import Limits, Runner
from tandem.offline.shared.owner import Owner
from tandem.offline.shared.patience import Patience
from tandem.offline.shared.queue import SharedQueue
from tandem.offline.shared.run import OwnedRun
from tandem.offline.shared.runner import SharedRunner
from tandem.offline.source import FileSource

LEASE_S = 0.5
PATIENCE_S = 30.0
LIMITS = Limits(max_in_flight=8, grace_s=0.05)


async def answer(entry: Entry) -> Answer:
    await asyncio.sleep(random.uniform(0.01, 0.05))
    return Answer("r", {"text": entry.body["prompt"], "usage": {"completion_tokens": 3}}, {}, 3)


async def own(queue: SharedQueue, requests: Path, output: Path) -> None:
    total = take_census(requests, LineParser(False, {})).total
    queue.open("me", {"total": str(total)})
    results = Results(output)
    source = FileSource(requests, LineParser(False, {}), lambda entry: None, results.finished)
    progress = Progress(total, results.num_completed, results.num_failed)
    owner = Owner(queue, source, results, progress, Patience(PATIENCE_S))
    shared = SharedRunner(queue, PATIENCE_S)
    try:
        await OwnedRun(owner, Runner(shared, answer, shared, Progress(0, 0, 0), LIMITS), shared).run()
    finally:
        await results.close()


async def join(queue: SharedQueue) -> None:
    shared = SharedRunner(queue, PATIENCE_S)
    async with shared:
        await Runner(shared, answer, shared, Progress(0, 0, 0), LIMITS).run()


if __name__ == "__main__":
    role, url, name, *paths = sys.argv[1:]
    shared_queue = SharedQueue(url, name, LEASE_S)
    asyncio.run(own(shared_queue, *map(Path, paths)) if role == "owner" else join(shared_queue))
