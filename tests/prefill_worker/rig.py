"""A real prefill worker over a tiny model and a real store, and prompts whose events can be awaited."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass

from kvstore.key import KvHandle
from prefill_worker.handoff import HandoffContext
from prefill_worker.job import KvOpened, PrefillJob
from prefill_worker.link_codec import LinkCodec
from prefill_worker.sender import Format
from prefill_worker.worker import PrefillWorker
from tandem.config import MIB, PrefillConfig
from tandem.engine.block_pool import BlockPool
from tandem.errors import TandemError
from tandem.output import OutputDelta
from tests.serving import (
    BLOCK_SIZE,
    FINGERPRINT,
    PATIENCE_S,
    Gate,
    Meddler,
    RunningStore,
    assert_empties,
    make_model,
    make_work,
    running_store,
    tokenizer,
)

OVERLAP_BYTES = 16  # so that most prompts of the tests leave while they are computed


def make_context(
    client, model, pool, chunk_bytes: int = MIB, draft=None, *, is_beside=True
) -> HandoffContext:
    form = Format(
        dtype="float32",
        fingerprint=FINGERPRINT,
        chunk_bytes=chunk_bytes,
        codec=LinkCodec.of("raw", model.cache, "float32"),
    )
    draft_cache = draft.cache if draft else None
    return HandoffContext(client, model.cache, pool, form, OVERLAP_BYTES, is_beside, draft_cache)


class Prompt:
    """A submitted prompt and what has been said about it."""

    def __init__(self, worker: PrefillWorker, work) -> None:
        self.opened: KvHandle | None = None
        self._events: asyncio.Queue = asyncio.Queue()
        self.work = work
        self.job: PrefillJob = worker.submit(work, self._events.put_nowait)

    @property
    def is_silent(self) -> bool:
        return all(isinstance(event, KvOpened) for event in self._events._queue)

    async def next(self):
        """The next event but for that the KV is on its way."""
        async with asyncio.timeout(PATIENCE_S):
            while isinstance(event := await self._events.get(), KvOpened):
                self.opened = event.handle
            return event

    async def token(self) -> OutputDelta:
        event = await self.next()
        assert isinstance(event, OutputDelta), event
        return event

    async def handle(self) -> KvHandle:
        event = await self.next()
        assert isinstance(event, KvHandle), event
        return event

    async def error(self) -> TandemError:
        event = await self.next()
        assert isinstance(event, TandemError), event
        return event


@dataclass
class Rig:
    worker: PrefillWorker
    pool: BlockPool
    model: object
    running: RunningStore

    @property
    def store(self):
        return self.running.store

    def submit(self, request_id="r", token_ids=None, **options) -> Prompt:
        return Prompt(self.worker, make_work(request_id, token_ids, **options))

    async def completes(self, prompt: Prompt) -> tuple[int, ...]:
        """Wait for token and handle, free the stored KV; returns the token."""
        delta = await prompt.token()
        await self.running.client.release(await prompt.handle())
        return delta.token_ids


@asynccontextmanager
async def prefilling(
    num_blocks=64,
    *,
    forward=None,
    client=None,
    tokens=None,
    chunk_bytes=MIB,
    store_bytes=64 * MIB,
    is_beside=True,
    **config,
):
    """`forward` and `client` wrap methods (tests.serving.Meddler). Afterwards nothing may be owned."""
    model = make_model(num_blocks)
    meddled = Meddler(model, forward=forward) if forward else model
    pool = BlockPool("prefill", num_blocks, BLOCK_SIZE)
    async with running_store(store_bytes) as running:
        kv_client = Meddler(running.client, **client) if client else running.client
        worker = PrefillWorker(
            PrefillConfig(**config),
            meddled,
            pool,
            tokens or tokenizer(),
            make_context(kv_client, model, pool, chunk_bytes, is_beside=is_beside),
        )
        try:
            yield Rig(worker, pool, model, running)
        finally:
            if isinstance(forward, Gate):
                forward.open()
            await worker.stop()
        await assert_empties(pool)
        assert worker.num_waiting == worker.num_running == 0
