"""What worker tests share: a tiny engine, a running KV store, work orders, and the books afterwards."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import torch

from kvstore.backends.memory import MemoryBackend
from kvstore.client import KvClient
from kvstore.server import KvServicer, add_to_server
from kvstore.store import KvStore
from kvstore.sweeper import Sweeper
from tandem import rpc
from tandem.config import KvStoreConfig
from tandem.engine.batch import SequenceRows
from tandem.engine.block_pool import BlockPool
from tandem.engine.model_runner import ModelRunner
from tandem.engine.paged_cache import PagedCache
from tandem.sampling import SamplingParams
from tandem.tokenizer import Tokenizer
from tandem.work import Work
from tests.checkpoints import tiny_llama

BLOCK_SIZE = 16
FINGERPRINT = bytes(range(32))
MIB = 1 << 20
NAN = float("nan")
PATIENCE_S = 30.0  # nothing here takes this long, so a hang is told from a busy machine


@functools.cache
def _loaded() -> ModelRunner:
    torch.set_num_threads(1)
    return ModelRunner.load(tiny_llama(), num_blocks=1, block_size=BLOCK_SIZE)


def make_model(num_blocks: int = 64) -> ModelRunner:
    """The tiny checkpoint over a cache of its own; the weights are loaded once per run."""
    loaded = _loaded()
    cache = PagedCache(loaded.geometry, num_blocks, BLOCK_SIZE)
    return ModelRunner(loaded._model, loaded.geometry, cache, loaded._linears)


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_dir(tiny_llama())


class Meddler:
    """Passes everything on to `target`, but lets a test wrap single methods: the faults one cannot cause."""

    def __init__(self, target, **wrappers) -> None:
        self._target = target
        self._wrappers = wrappers

    def __getattr__(self, name):
        value = getattr(self._target, name)
        return functools.partial(self._wrappers[name], value) if name in self._wrappers else value


class Gate:
    """Holds calls in their thread until a test opens it. `entered` counts those that have come."""

    def __init__(self) -> None:
        self.entered = 0
        self._tickets = threading.Semaphore(0)
        self._is_open = False

    def __call__(self, call, *args, **kwargs):
        self.entered += 1
        if not self._is_open:
            assert self._tickets.acquire(timeout=PATIENCE_S)
        return call(*args, **kwargs)

    def let(self, count: int = 1) -> None:
        self._tickets.release(count)

    def open(self) -> None:
        self._is_open = True
        self._tickets.release(1000)


class BatchGate(Gate):
    """The same for forwards; `sizes` are their rows."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __call__(self, call, batch):
        self.sizes.append(batch.num_rows)
        return super().__call__(call, batch)


@functools.cache
def greedy(prompt: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
    """What the model alone continues the prompt with: a full forward for every token."""
    model, tokens = make_model(), list(prompt)
    for _ in range(num_tokens):
        rows = SequenceRows(tokens, 0, range(-(-len(tokens) // BLOCK_SIZE)))
        tokens.append(int(model.forward(model.batch([rows]))[0].argmax()))
    return tuple(tokens[len(prompt) :])


def prompt_of(length: int, start: int = 0) -> tuple[int, ...]:
    """Reproducible tokens that do not repeat early."""
    return tuple((start + 7 * i + i * i) % 251 for i in range(length))


def make_work(request_id="r", token_ids=None, *, epoch=0, delivered=(), timeout_s=60.0, **sampling) -> Work:
    prompt = tuple(token_ids) if token_ids is not None else prompt_of(20)
    return Work(
        request_id=request_id,
        epoch=epoch,
        token_ids=prompt + tuple(delivered),
        num_prompt_tokens=len(prompt),
        sampling=SamplingParams(**{"max_tokens": 8, "seed": 0, **sampling}),
        deadline_s=time.monotonic() + timeout_s,
        fingerprint=FINGERPRINT,
    )


@dataclass
class RunningStore:
    store: KvStore
    client: KvClient
    config: KvStoreConfig
    address: str

    async def freed(self) -> None:
        """Until nothing is stored any more."""
        await until(lambda: self.store.audit().is_empty)


@asynccontextmanager
async def running_store(total_bytes: int = 64 * MIB, config: KvStoreConfig | None = None):
    """A real store behind a real server. Afterwards it must be sound."""
    config = config or KvStoreConfig()
    store = KvStore(MemoryBackend(), total_bytes, config)
    server = rpc.server(public=False)
    add_to_server(KvServicer(store), server)
    address = f"127.0.0.1:{rpc.bind(server, '127.0.0.1', 0)}"
    await server.start()
    async with Sweeper(store), rpc.channel(address) as channel:
        yield RunningStore(store, KvClient(channel, config), config, address)
    await server.stop(None)
    store.check_integrity()


async def until(condition: Callable[[], object], within_s: float = PATIENCE_S) -> None:
    """Wait for what happens in another task or thread of this process."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 (nobody tells a test)
            await asyncio.sleep(0.002)


async def assert_empties(pool: BlockPool) -> None:
    """The books of a pool whose work has ended: every block is free."""
    await until(lambda: pool.audit().is_empty)
    pool.check_integrity()
