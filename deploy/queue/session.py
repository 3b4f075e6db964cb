"""One run of a queue in this process: checks, service, runner, display, and how it ended."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from deploy.queue.asking import LineReader, ServiceAsker, Texts
from deploy.queue.display import Display, describe
from deploy.queue.joining import open_queue, owned_run
from deploy.queue.serving import Guard, Service, signals
from tandem.errors import ConfigError
from tandem.offline.census import Census, file_digest, take_census
from tandem.offline.job import Job, save_job
from tandem.offline.lines import LineParser, is_plain_text
from tandem.offline.progress import Progress, Snapshot
from tandem.offline.results import Results, error_path
from tandem.offline.runner import Limits, Runner
from tandem.offline.source import FileSource

SAVE_EVERY_S = 1.0
EXIT_FAILED, EXIT_BAD_LINES = 1, 2


class Run(Protocol):
    """A `Runner` over files, or an `OwnedRun` over Redis."""

    @property
    def progress(self) -> Progress: ...

    @property
    def stop(self) -> asyncio.Event: ...

    def run(self) -> Coroutine[Any, Any, None]: ...


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
        async with self.service.serving(self.err) as serving:
            model = serving.model
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
            parser = replace(parser, model_fingerprint=model.fingerprint)
            source = FileSource(self.input, parser, reader.check, results.finished)
            asker = ServiceAsker(serving.client, reader, texts, model.name)
            return await self._follow(self._run_of(source, asker, results), results, serving.guard)

    def _run_of(self, source: FileSource, asker: ServiceAsker, results: Results) -> Run:
        progress = Progress(self.job.total, results.num_completed, results.num_failed)
        if not self.job.queue:
            return Runner(source, asker, results, progress, self.limits)
        queue = open_queue(self.job)
        self.err.print(f"others join with: tandem queue work --queue URL --name {queue.name} --server …")
        return owned_run(queue, source, asker, results, progress, self.limits)

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

    async def _follow(self, run: Run, results: Results, guard: Guard) -> int:
        """Run, save and show how far it is; a signal lets it end in order."""
        if results.finished.count or results.num_dropped:
            torn = f", {results.num_dropped} torn" if results.num_dropped else ""
            self.err.print(f"going on: {results.finished.count} of {self.job.total} lines are finished{torn}")
        self._save(run)
        with signals(run.stop) as received, Display(self.input.name, self.job.total, self.err) as display:
            ticking = asyncio.create_task(self._tick(run, display))
            try:
                await guard(run.run())
            finally:
                ticking.cancel()
                await results.close()
                display.show(self._save(run))
        return self._say_end(run.progress.snapshot(), received)

    async def _tick(self, run: Run, display: Display) -> None:
        while True:
            await asyncio.sleep(SAVE_EVERY_S)
            display.show(self._save(run))

    def _save(self, run: Run) -> Snapshot:
        snapshot = run.progress.snapshot()
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
