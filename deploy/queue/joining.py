"""Queues in Redis: the owner's run of one, and the runs of those who join it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from deploy.queue.asking import LineReader, ServiceAsker, Texts
from deploy.queue.display import Display, describe
from deploy.queue.serving import Service, signals
from tandem.errors import ConfigError
from tandem.offline.job import Job
from tandem.offline.progress import Progress
from tandem.offline.results import Results
from tandem.offline.runner import Execute, Limits, Runner
from tandem.offline.shared.owner import Owner
from tandem.offline.shared.patience import Patience
from tandem.offline.shared.queue import SharedQueue
from tandem.offline.shared.run import OwnedRun
from tandem.offline.shared.runner import SharedRunner
from tandem.offline.source import Source

SHOW_EVERY_S = 1.0


def open_queue(job: Job) -> SharedQueue:
    """Begin a job's queue, or go on with it. Raises `ConfigError` if that cannot be."""
    queue = SharedQueue(job.service["queue"], job.queue)
    queue.check_server()
    queue.open(
        job.owner,
        {
            "model": job.model,
            "model_fingerprint": job.model_fingerprint,
            "input_sha256": job.input_sha256,
            "total": str(job.total),
        },
    )
    return queue


def owned_run(
    queue: SharedQueue,
    source: Source,
    execute: Execute,
    results: Results,
    progress: Progress,
    limits: Limits,
) -> OwnedRun:
    """A run of the whole queue, in which this process is one of the runners."""
    shared = SharedRunner(queue, limits.patience_s)
    runner = Runner(shared, execute, shared, Progress(progress.total, 0, 0), limits)
    return OwnedRun(Owner(queue, source, results, progress, Patience(limits.patience_s)), runner, shared)


@dataclass(frozen=True, slots=True)
class Worker:
    """Joins a queue that another process owns, and works on it to its end."""

    queue: SharedQueue
    service: Service
    limits: Limits
    err: Console

    async def run(self) -> int:
        """Until the queue has ended or a signal comes; returns the exit code."""
        job = self._job()
        texts = Texts(self.service.model_path)
        reader = LineReader(texts)
        async with self.service.serving(self.err) as serving:
            if serving.model.fingerprint != job["model_fingerprint"]:
                raise ConfigError(f"the queue was begun with {job['model']} in another build; serve that one")
            asker = ServiceAsker(serving.client, reader, texts, serving.model.name)
            shared = SharedRunner(self.queue, self.limits.patience_s)
            runner = Runner(shared, asker, shared, Progress(int(job["total"]), 0, 0), self.limits)
            with signals(runner.stop) as received, Display(self.queue.name, 0, self.err) as display:
                showing = asyncio.create_task(_show(runner, display))
                try:
                    async with shared:
                        await serving.guard(runner.run())
                finally:
                    showing.cancel()
        last = runner.progress.snapshot()
        self.err.print(f"{last.done} lines done here, {describe(last)}")
        return 128 + received[0] if received else 0

    def _job(self) -> dict[str, str]:
        self.queue.check_server()
        job = self.queue.job()
        if not job:
            raise ConfigError(f"there is no queue {self.queue.name} in this Redis; submit it first")
        if "ended" in job:
            raise ConfigError(f"the queue {self.queue.name} has {job['ended']}; there is nothing to do")
        return job


async def _show(runner: Runner, display: Display) -> None:
    while True:
        await asyncio.sleep(SHOW_EVERY_S)
        display.show(runner.progress.snapshot())


def facts(queue: SharedQueue) -> dict[str, Any]:
    """How far a queue in Redis is, from any machine."""
    job = queue.job()
    if not job:
        raise ConfigError(f"there is no queue {queue.name} in this Redis")
    return {
        "state": job.get("ended", "running"),
        "total": int(job["total"]),
        **queue.counts(),
        "in_flight": 0 if "ended" in job else queue.num_held(),
        "duplicated": 0,  # a line is done once: tandem/offline/shared/scripts.py
        "model": job["model"],
    }
