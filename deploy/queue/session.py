"""One run of a queue in this process: checks, service, runner, display, and how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from deploy.access import Access
from deploy.queue.asking import LineReader, ServiceAsker, Texts
from deploy.queue.display import Display, describe
from tandem.config import ClusterConfig
from tandem.errors import ConfigError
from tandem.offline.census import Census, file_digest, take_census
from tandem.offline.job import Job, save_job
from tandem.offline.lines import LineParser, is_plain_text
from tandem.offline.progress import Progress, Snapshot
from tandem.offline.results import Results, error_path
from tandem.offline.runner import Limits, Runner

SAVE_EVERY_S = 1.0
SERVING_S = 30.0
EXIT_FAILED, EXIT_BAD_LINES = 1, 2

Guard = Callable[[Awaitable[None]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Service:
    """Where lines are sent: to a running service, or to an embedded one of `config`."""

    access: Access
    config: ClusterConfig | None
    model_path: Path | None  # the checkpoint's folder, where it is known


@dataclass(slots=True)
class Session:
    """A run of `job.input` to `output`. The caller holds the queue's lock."""

    job: Job
    output: Path
    service: Service
    limits: Limits
    err: Console

    @property
    def input(self) -> Path:
        return Path(self.job.input)

    async def run(self) -> int:
        """Until every line has its record or a signal comes; returns the exit code."""
        texts = Texts(self.service.model_path)
        reader = LineReader(texts)
        parser = LineParser(is_plain_text(self.input), self.job.defaults)
        digest = await asyncio.to_thread(file_digest, self.input)
        census = None if self.job.is_checked else await self._census(parser, reader)
        async with self._serving() as (address, guard), self.service.access.client(address) as client:
            await client.wait_until_serving(SERVING_S)
            model = (await client.models())[0]
            if census is not None:
                self.job = replace(
                    self.job,
                    input_sha256=digest,
                    total=census.total,
                    num_bad=census.num_bad,
                    model=model.name,
                    model_fingerprint=model.fingerprint,
                )
            self.job.check_same(digest, model.fingerprint)
            results = await asyncio.to_thread(Results, self.output)
            runner = Runner(
                input=self.input,
                parser=replace(parser, model_fingerprint=model.fingerprint),
                check=reader.check,
                execute=ServiceAsker(client, reader, texts, model.name),
                results=results,
                progress=Progress(self.job.total, results.num_completed, results.num_failed),
                limits=self.limits,
            )
            return await self._follow(runner, guard)

    async def _census(self, parser: LineParser, reader: LineReader) -> Census:
        with self.err.status(f"checking {self.input} …"):
            census = await asyncio.to_thread(take_census, self.input, parser, reader.check)
        for line, column, message in census.bad:
            self.err.print(f"[yellow]{self.input}:{line}:{column}: {message}[/]")
        if census.num_bad:
            self.err.print(f"[yellow]{census.num_bad} of {census.total} lines become error records[/]")
        if not census.total:
            raise ConfigError(f"{self.input} has no lines; nothing to do")
        return census

    @contextlib.asynccontextmanager
    async def _serving(self) -> AsyncIterator[tuple[str, Guard]]:
        """The service's address, and how to await something that needs it."""
        if self.service.access.server is not None:
            yield self.service.access.server, _unguarded
            return
        from deploy.embedded import EmbeddedService

        assert self.service.config is not None
        with self.err.status("starting an embedded service …"):
            service = await EmbeddedService(self.service.config).__aenter__()
        try:
            yield service.address, lambda awaited: service.while_healthy(_coroutine(awaited))
        finally:
            await service.__aexit__(None, None, None)

    async def _follow(self, runner: Runner, guard: Guard) -> int:
        """Run, save and show how far it is; a signal lets it end in order."""
        results = runner.results
        if results.finished.count or results.num_dropped:
            torn = f", {results.num_dropped} torn" if results.num_dropped else ""
            self.err.print(f"going on: {results.finished.count} of {self.job.total} lines are finished{torn}")
        self._save(runner)
        with _signals(runner.stop) as received, Display(self.input.name, self.job.total, self.err) as display:
            ticking = asyncio.create_task(self._tick(runner, display))
            try:
                await guard(runner.run())
            finally:
                ticking.cancel()
                await results.close()
                display.show(self._save(runner))
        return self._say_end(runner.progress.snapshot(), received)

    async def _tick(self, runner: Runner, display: Display) -> None:
        while True:
            await asyncio.sleep(SAVE_EVERY_S)
            display.show(self._save(runner))

    def _save(self, runner: Runner) -> Snapshot:
        snapshot = runner.progress.snapshot()
        save_job(self.output, self.job.with_progress(asdict(snapshot)))
        return snapshot

    def _say_end(self, last: Snapshot, received: list[int]) -> int:
        where = f"results in {self.output}" + (f", {error_path(self.output)}" if last.failed else "")
        self.err.print(f"{last.completed} of {last.total} completed, {describe(last)}; {where}")
        if last.done < last.total and received:
            self.err.print(f"go on with: tandem queue resume {self.input} --output {self.output}")
            return 128 + received[0]
        if last.failed > self.job.num_bad:
            return EXIT_FAILED
        return EXIT_BAD_LINES if last.failed else 0


async def _unguarded(awaited: Awaitable[None]) -> None:
    await awaited


async def _coroutine(awaited: Awaitable[None]) -> None:
    await awaited


@contextlib.contextmanager
def _signals(stop: asyncio.Event) -> Any:
    """Ctrl-C and SIGTERM set `stop`; yields the list of those that came."""
    loop, received = asyncio.get_running_loop(), list[int]()

    def note(number: int) -> None:
        received.append(number)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, note, number)
    try:
        yield received
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
