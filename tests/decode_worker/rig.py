"""A real decode worker over a tiny model and a real store, and requests whose events can be awaited."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass

from decode_worker.restore import KvRestorer
from decode_worker.reuse import NOTHING
from decode_worker.sequence import DecodeSequence, Started
from decode_worker.worker import DecodeWorker
from kvstore.key import KvHandle, object_id_of
from kvstore.records import ChunkRange, ObjectHeader
from tandem.config import DecodeConfig
from tandem.engine.batch import SequenceRows
from tandem.engine.block_pool import BlockPool
from tandem.engine.kv_transfer import export_kv
from tandem.engine.sampler import choose, most_probable
from tandem.errors import TandemError
from tandem.output import OutputDelta
from tandem.work import Work
from tests.serving import (
    BLOCK_SIZE,
    FINGERPRINT,
    PATIENCE_S,
    Gate,
    Meddler,
    RunningStore,
    assert_empties,
    greedy,
    make_model,
    make_work,
    prompt_of,
    running_store,
    tokenizer,
)


def make_order(request_id="r", prompt=None, *, delivered=1, **options) -> Work:
    """A work order as it is after prefill: the prompt and the first greedy tokens."""
    prompt = tuple(prompt) if prompt is not None else prompt_of(20)
    return make_work(request_id, prompt, delivered=greedy(prompt, delivered), **options)


async def store_kv(running: RunningStore, work: Work, num_chunks: int = 0) -> KvHandle:
    """Put the KV of all tokens but the last, one block and layer per chunk."""
    tokens = work.token_ids[:-1]
    num_blocks = -(-len(tokens) // BLOCK_SIZE)
    model, blocks = make_model(num_blocks), range(num_blocks)
    model.forward(model.batch([SequenceRows(tokens, 0, blocks)]))
    layers = model.geometry.num_layers
    header = ObjectHeader(
        object_id=object_id_of("", work.request_id),
        epoch=work.epoch,
        tenant="",
        fingerprint=FINGERPRINT,
        dtype="float32",
        num_layers=layers,
        num_tokens=len(tokens),
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        total_bytes=num_blocks * model.cache.block_bytes,
    )
    async with running.client.put(header) as writer:
        for block in blocks:
            used = min(len(tokens) - block * BLOCK_SIZE, BLOCK_SIZE)
            for layer in range(layers):
                where = ChunkRange(block_start=block, num_blocks=1, layer_start=layer, num_layers=1)
                await writer.write(where, export_kv(model.cache, [block], used, layer, 1))
        return await writer.seal()


class Client:
    """The one who is told: events of all its requests, and in how many messages they came."""

    def __init__(self) -> None:
        self.messages: list[list[tuple[str, object]]] = []
        self._events: dict[str, asyncio.Queue] = {}

    def emit(self, news) -> None:
        self.messages.append([(sequence.work.request_id, event) for sequence, event in news])
        for sequence, event in news:
            self._queue(sequence.work.request_id).put_nowait(event)

    def _queue(self, request_id: str) -> asyncio.Queue:
        return self._events.setdefault(request_id, asyncio.Queue())

    def is_silent(self, request_id: str) -> bool:
        return self._queue(request_id).empty()

    async def next(self, request_id="r"):
        async with asyncio.timeout(PATIENCE_S):
            return await self._queue(request_id).get()

    async def started(self, request_id="r") -> Started:
        event = await self.next(request_id)
        assert isinstance(event, Started), event
        return event

    async def tokens(self, request_id="r", num_tokens=1) -> tuple[int, ...]:
        found: tuple[int, ...] = ()
        while len(found) < num_tokens:
            event = await self.next(request_id)
            assert isinstance(event, OutputDelta), event
            found += event.token_ids
        return found

    async def error(self, request_id="r") -> TandemError:
        while not isinstance(event := await self.next(request_id), TandemError):
            assert isinstance(event, Started | OutputDelta)
        return event

    async def all(self, request_id="r") -> list[OutputDelta]:
        """Everything until the end, which must be a success."""
        await self.started(request_id)
        return await self.rest(request_id)

    async def rest(self, request_id="r") -> list[OutputDelta]:
        deltas: list[OutputDelta] = []
        while not deltas or deltas[-1].finish is None:
            event = await self.next(request_id)
            assert isinstance(event, OutputDelta), event
            deltas.append(event)
        return deltas


@dataclass
class Rig:
    worker: DecodeWorker
    pool: BlockPool
    running: RunningStore
    client: Client

    @property
    def store(self):
        return self.running.store

    async def start(self, work: Work, client: Client | None = None) -> DecodeSequence:
        handle = await store_kv(self.running, work)
        return self.worker.start(work, handle, (client or self.client).emit)


def tokens_of(deltas) -> tuple[int, ...]:
    return tuple(token for delta in deltas for token in delta.token_ids)


def text_of(deltas) -> str:
    return "".join(delta.text for delta in deltas)


class MeddledModel(Meddler):
    """Every forward goes through the wrapper."""

    def choose(self, rows, draws=None):
        logits = self.forward(self.batch(rows))
        return most_probable(logits) if draws is None else choose(logits, draws)


@asynccontextmanager
async def decoding(
    num_blocks=64, *, forward=None, write_blocks=None, client=None, tokens=None, reuse=NOTHING, **config
):
    """`forward`, `write_blocks` (of the cache) and `client` wrap methods. Afterwards nothing is owned."""
    model = make_model(num_blocks)
    pool = BlockPool("decode", num_blocks, BLOCK_SIZE)
    cache = Meddler(model.cache, write_blocks=write_blocks) if write_blocks else model.cache
    async with running_store() as running:
        kv_client = Meddler(running.client, **client) if client else running.client
        worker = DecodeWorker(
            DecodeConfig(**config),
            MeddledModel(model, forward=forward) if forward else model,
            pool,
            tokens or tokenizer(),
            KvRestorer(kv_client, cache, pool),
            reuse=reuse,
        )
        try:
            yield Rig(worker, pool, running, Client())
        finally:
            for gate in (forward, write_blocks):
                if isinstance(gate, Gate):
                    gate.open()
            await worker.stop()
        await assert_empties(pool)
        assert worker.num_waiting == worker.num_running == 0
