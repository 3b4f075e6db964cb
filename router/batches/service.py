"""Batches that clients leave with this router: kept in a folder, run one after the other for each tenant.

The life of a batch here:
 1. A client uploads a file of requests (or streams them, `Batches.submit`), and `create` makes it a batch.
 2. The tenant's task takes its oldest batch that has not ended, checks every line, and runs what is good.
 3. Lines are requests of the lowest priority, and of a bounded number at once: whoever waits for an
    answer goes first.
 4. Each line ends as one record of one of two files, which are the owner's when the batch has ended.
 5. Whatever ends this process, the next one that opens the folder goes on from the records there are.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from weakref import WeakValueDictionary

from router.batches.asking import RouterAsker
from router.batches.batch import TRANSITIONS, Batch, BatchStatus
from router.batches.book import BatchBook
from router.batches.files import UPLOADED, FileStore, disk_errors
from router.batches.pulse import Pulse
from router.batches.run import BatchRun, Model
from tandem.config import BatchConfig
from tandem.errors import ConfigError, FailedPrecondition
from tandem.offline.journal import StorageError
from tandem.offline.lines import URLS
from tandem.sampling import bad_param

log = logging.getLogger(__name__)

RETRY_S = 15.0  # after the disk has refused a record
MAX_METADATA, MAX_KEY, MAX_VALUE = 16, 64, 512  # as OpenAI has them
WINDOW = re.compile(r"([1-9][0-9]{0,5})([smhd])")
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
MAX_WINDOW_S = 14 * 86400


class Batches:
    """All tenants' files and batches. Owned by the event loop; only the disk is asked in threads."""

    def __init__(
        self, config: BatchConfig, model: Model, max_in_flight: int, asker: Callable[[str], RouterAsker]
    ) -> None:
        """Raises `ConfigError` if the folder cannot be used, or another process uses it."""
        assert config.dir is not None
        self._config = config
        self._model = model
        self._max_in_flight = max_in_flight
        self._asker = asker
        self._lock = _lock(config.dir)
        self.files = FileStore(config.dir / "files", config)
        self.book = BatchBook(config.dir / "batches", self.files, config.max_tenant_files)
        self._runs: dict[str, BatchRun] = {}  # by tenant
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._pulses: WeakValueDictionary[str, Pulse] = WeakValueDictionary()
        self._turn = asyncio.Lock()  # held while a batch that does not run changes, or begins to run
        self._stopping = asyncio.Event()

    def start(self) -> None:
        """Go on with what an earlier process left."""
        for batch in self.book.all():
            self._attend(batch)

    async def stop(self) -> None:
        """Let lines that run finish for a little, and leave the rest for the next start."""
        self._stopping.set()
        for run in self._runs.values():
            run.stop.set()
        if self._tasks:
            await asyncio.wait(self._tasks.values())
        os.close(self._lock)

    async def create(
        self, tenant: str, endpoint: str, window: str, file_id: str, metadata: dict[str, str]
    ) -> Batch:
        """A batch of a file; without one, its requests are yet to be submitted. Raises `BAD_PARAM`,
        `NO_SUCH_FILE`, `TENANT_QUOTA`."""
        if endpoint not in URLS:
            raise bad_param(f"`endpoint` must be one of {', '.join(URLS)}")
        expires_s = int(time.time()) + window_s(window)
        if file_id and self.files.get(tenant, file_id).purpose != UPLOADED:
            raise bad_param("`input_file_id` must be a file with the purpose `batch`")
        batch = Batch(
            id=f"batch_{secrets.token_hex(12)}",
            tenant=tenant,
            endpoint=endpoint,
            window=window,
            expires_s=expires_s,
            entered_s={BatchStatus.VALIDATING.value: int(time.time())},
            input_file_id=file_id,
            metadata=check_metadata(metadata),
        )
        await asyncio.to_thread(self.book.add, batch)
        self._attend(batch)
        return batch

    async def submit(self, tenant: str, batch_id: str, lines: AsyncIterator[bytes]) -> Batch:
        """Give a batch its requests, and let it begin. A stream that breaks off leaves it as it was."""
        self._check_open(tenant, batch_id)
        upload = self.files.upload(tenant)
        try:
            async for line in lines:
                await asyncio.to_thread(upload.write, line)
            async with self._turn:
                batch = self._check_open(tenant, batch_id)
                file = await asyncio.to_thread(upload.commit, f"{batch_id}_input.jsonl")
                await self._save(replace(batch, input_file_id=file.id))
        finally:
            upload.abandon()
        self._attend(batch)
        return self.get(tenant, batch_id)

    def get(self, tenant: str, batch_id: str) -> Batch:
        """As it is now. Raises `NO_SUCH_BATCH`."""
        run = self.run_of(batch_id)
        batch = self.book.get(tenant, batch_id)
        return run.now() if run is not None else batch

    def of(self, tenant: str) -> list[Batch]:
        """Newest first."""
        return [self.get(tenant, batch.id) for batch in reversed(self.book.all()) if batch.tenant == tenant]

    def run_of(self, batch_id: str) -> BatchRun | None:
        """The run of a batch whose turn it is."""
        return next((run for run in self._runs.values() if run.batch.id == batch_id), None)

    def pulse(self, batch_id: str) -> Pulse:
        """Beats with the batch's records and at its end, for as long as somebody holds it."""
        return self._pulses.setdefault(batch_id, Pulse())

    async def cancel(self, tenant: str, batch_id: str) -> Batch:
        """Begin no more of its lines. What is finished stays. Raises `BATCH_ENDED`."""
        async with self._turn:
            batch = self.book.get(tenant, batch_id)
            if batch.status.has_ended:
                told = f"the batch is {batch.status.value}; only one that has not ended can be cancelled"
                raise FailedPrecondition("BATCH_ENDED", told)
            if (run := self.run_of(batch_id)) is not None:
                if await run.enter(BatchStatus.CANCELLING):
                    run.stop.set()
            elif BatchStatus.CANCELLING in TRANSITIONS[batch.status]:
                await self._save(batch.to(BatchStatus.CANCELLING, time.time()))
                self._wake(tenant)
        return self.get(tenant, batch_id)

    def _check_open(self, tenant: str, batch_id: str) -> Batch:
        batch = self.book.get(tenant, batch_id)
        if batch.input_file_id or batch.status is not BatchStatus.VALIDATING:
            raise FailedPrecondition("BATCH_ENDED", "the batch takes no more requests")
        return batch

    async def _save(self, batch: Batch) -> None:
        with disk_errors():
            await asyncio.to_thread(self.book.save, batch)

    def _attend(self, batch: Batch) -> None:
        """See to it that a batch gets its turn; one without requests ends with its window at the latest."""
        if batch.status.has_ended:
            return
        left_s = max(0.0, batch.expires_s - time.time())
        asyncio.get_running_loop().call_later(left_s, self._wake, batch.tenant)
        self._wake(batch.tenant)

    def _wake(self, tenant: str) -> None:
        if tenant not in self._tasks and not self._stopping.is_set():
            self._tasks[tenant] = asyncio.create_task(self._work(tenant))

    async def _work(self, tenant: str) -> None:
        """Run the tenant's batches until there is none to run."""
        while not self._stopping.is_set():
            async with self._turn:
                run = self._next_run(tenant)
                if run is None or self._stopping.is_set():
                    break
                self._runs[tenant] = run
            try:
                await run.run()
            except Exception as error:
                is_known = isinstance(error, StorageError | OSError)
                log.error("batch %s waits %g s", run.batch.id, RETRY_S, exc_info=None if is_known else error)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), RETRY_S)
            finally:
                del self._runs[tenant]
                run.changed.beat()
        del self._tasks[tenant]

    def _next_run(self, tenant: str) -> BatchRun | None:
        """Of the oldest batch that can go on now."""
        for batch in self.book.all():
            is_open = batch.tenant == tenant and not batch.status.has_ended
            is_waiting = not batch.input_file_id and batch.status is BatchStatus.VALIDATING
            if is_open and (not is_waiting or time.time() >= batch.expires_s):
                ask, pulse = self._asker(tenant), self.pulse(batch.id)
                return BatchRun(batch, self.book, ask, self._model, self._config, self._max_in_flight, pulse)
        return None


def window_s(window: str) -> int:
    """Seconds of a completion window such as 24h. Raises `BAD_PARAM`."""
    found = WINDOW.fullmatch(window)
    seconds = int(found[1]) * SECONDS[found[2]] if found else 0
    if not 0 < seconds <= MAX_WINDOW_S:
        raise bad_param("`completion_window` must be a time of up to 14d, such as 24h")
    return seconds


def check_metadata(metadata: dict[str, str]) -> dict[str, str]:
    """The labels of a batch, within OpenAI's limits. Raises `BAD_PARAM`."""
    are_texts = all(isinstance(value, str) for value in metadata.values())
    if not are_texts or len(metadata) > MAX_METADATA:
        raise bad_param(f"`metadata` must be at most {MAX_METADATA} texts by name")
    if any(len(key) > MAX_KEY or len(value) > MAX_VALUE for key, value in metadata.items()):
        raise bad_param(f"`metadata` has names of up to {MAX_KEY} and texts of up to {MAX_VALUE} characters")
    return metadata


def _lock(folder: Path) -> int:
    """Keep every other process away, until the descriptor is closed. Raises `ConfigError`."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"cannot keep batches in {folder}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise ConfigError(f"another process keeps batches in {folder}; give each service its own") from None
    return lock
