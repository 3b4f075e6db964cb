"""A whole service in one process, and the means to look at it, hold it and break it.

Gates and faults are put on the real objects: everything before and behind them runs as it always does.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import grpc
from grpc_status import rpc_status

from deploy.local import LocalCluster
from tandem.config import CacheConfig, ClusterConfig, KvStoreConfig, ModelConfig, RouterConfig
from tandem.errors import TandemError
from tandem.pb.v1 import generation_pb2 as pb
from tandem.pb.v1 import generation_pb2_grpc
from tandem.rpc import to_tandem_error
from tandem.sampling import MAX_N
from tests.checkpoints import tiny_llama

KIB, MIB = 1 << 10, 1 << 20
BLOCK_SIZE = 16
BLOCK_BYTES = 8 * KIB  # of the tiny checkpoint: 16 tokens of 2 layers, 2 heads, 16 numbers, keys and values
MAX_CONTEXT = 512
PATIENCE_S = 30.0  # nothing here takes this long, so a hang is told from a busy machine


def config(
    *, prefill_blocks: int = 128, decode_blocks: int = 256, store_blocks: int = 256, **parts: dict[str, Any]
) -> ClusterConfig:
    """A service of the tiny checkpoint; pools in blocks, other settings by section.

    Leases outlive every test, so that what is not given back explicitly is found. KV crosses gRPC, where it
    can be damaged on its way.
    """
    built = ClusterConfig(
        model=ModelConfig(path=tiny_llama()),
        cache=CacheConfig(
            prefill_bytes=prefill_blocks * BLOCK_BYTES,
            decode_bytes=decode_blocks * BLOCK_BYTES,
            store_bytes=store_blocks * BLOCK_BYTES,
        ),
        kvstore=KvStoreConfig(url="memory://", lease_s=120.0),
        router=RouterConfig(default_timeout_s=PATIENCE_S),
    )
    return replace(built, **{name: replace(getattr(built, name), **part) for name, part in parts.items()})


@asynccontextmanager
async def running(
    settings: ClusterConfig | None = None, num_prefill: int = 1, num_decode: int = 1
) -> AsyncIterator[LocalCluster]:
    """A cluster that must have lost nothing when the test is done with it."""
    async with LocalCluster(settings or config(), num_prefill, num_decode) as cluster:
        yield cluster
        await quiesce(cluster)


async def until(condition: Callable[[], Any], within_s: float = PATIENCE_S) -> None:
    """Wait for what happens in another task of this process."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 (nobody tells a test)
            await asyncio.sleep(0.002)


async def quiesce(cluster: LocalCluster, within_s: float = 10.0) -> None:
    """Every pool of the service is sound and empty soon after the last request."""
    try:
        await until(lambda: not _held(cluster), within_s)
    except TimeoutError:
        raise AssertionError(f"still held after {within_s} s: {_held(cluster)}") from None
    for worker in (*cluster.prefills, *cluster.decodes):
        worker.worker._pool.check_integrity()
    store = store_of(cluster)
    await store.turns.take(store.check_integrity)  # behind what goes on in a thread of its own
    assert not any(audit.orphans for audit in cluster.audit())


def _held(cluster: LocalCluster) -> list[object]:
    audits = [audit for audit in cluster.audit() if not audit.is_empty]
    return [*audits, *cluster.router.dispatcher._flights, *cluster.router.dispatcher.planner._queue._entries]


def store_of(cluster: LocalCluster) -> Any:
    return cluster.store._store


# --- asking ---


@dataclass(slots=True)
class Result:
    """What one completion of a stream brought."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[pb.TokenLogprobs] = field(default_factory=list)
    admitted: list[pb.Admitted] = field(default_factory=list)
    finished: pb.Finished | None = None

    def take(self, event: pb.StreamGenerateResponse) -> None:
        """Account for an event; positions must follow each other without gap or repetition."""
        assert self.finished is None, "something came after the end"
        match event.WhichOneof("event"):
            case "admitted":
                self.admitted.append(event.admitted)
            case "token_chunk":
                chunk = event.token_chunk
                assert chunk.token_ids, "an empty chunk"
                assert chunk.position == len(self.token_ids), (chunk.position, len(self.token_ids))
                self.token_ids.extend(chunk.token_ids)
                self.text += chunk.text
                self.logprobs.extend(chunk.logprobs)
            case "finished":
                self.finished = event.finished

    @property
    def reason(self) -> str:
        assert self.finished is not None
        return pb.FinishReason.Name(self.finished.reason).removeprefix("FINISH_REASON_")


def ask(
    prompt: str | Sequence[int] | None = "hello",
    *,
    request_id: str = "",
    model: str = "",
    priority: int = 0,
    timeout_s: float | None = None,
    **sampling: Any,
) -> pb.GenerationInput:
    """The message of a request; sampling parameters by name."""
    message = pb.GenerationInput(
        request_id=request_id, model=model, priority=priority, sampling=pb.SamplingParams(**sampling)
    )
    if isinstance(prompt, str):
        message.text = prompt
    elif prompt is not None:
        message.token_ids.ids.extend(prompt)
    if timeout_s is not None:
        message.timeout.FromNanoseconds(int(1e9 * timeout_s))
    return message


def open_stream(cluster: LocalCluster, message: pb.GenerationInput) -> Any:
    """The call itself, for those who cancel or read it step by step."""
    stub: Any = generation_pb2_grpc.GenerationServiceStub(cluster.channel)
    return stub.StreamGenerate(pb.StreamGenerateRequest(input=message), timeout=2 * PATIENCE_S)


async def stream(cluster: LocalCluster, message: pb.GenerationInput) -> list[Result]:
    """All completions of a request, by index. Raises `AioRpcError`."""
    results = [Result() for _ in range(min(message.sampling.n or 1, MAX_N))]
    async for event in open_stream(cluster, message):
        results[getattr(event, event.WhichOneof("event")).index].take(event)
    return results


async def complete(cluster: LocalCluster, message: pb.GenerationInput) -> Result:
    """The one completion of a request, whose stream must have ended in order."""
    [result] = await stream(cluster, message)
    assert result.finished is not None
    return result


async def generate(cluster: LocalCluster, message: pb.GenerationInput) -> pb.GenerateResponse:
    stub: Any = generation_pb2_grpc.GenerationServiceStub(cluster.channel)
    return await stub.Generate(pb.GenerateRequest(input=message), timeout=2 * PATIENCE_S)


async def cancel(cluster: LocalCluster, request_id: str) -> None:
    stub: Any = generation_pb2_grpc.GenerationServiceStub(cluster.channel)
    await stub.CancelGeneration(pb.CancelGenerationRequest(request_id=request_id), timeout=PATIENCE_S)


async def read_tokens(call: Any, result: Result, num_tokens: int) -> Result:
    """Follow a stream until it has brought that many tokens."""
    while len(result.token_ids) < num_tokens:
        event = await call.read()
        assert event is not grpc.aio.EOF, result
        result.take(event)
    return result


@dataclass(frozen=True, slots=True)
class Failure:
    """How a call failed, as the client sees it."""

    code: str
    error: TandemError
    text: str
    trailing: dict[str, Any]
    details: list[Any]  # of google.rpc.Status

    @property
    def reason(self) -> str:
        return self.error.reason

    @property
    def message(self) -> str:
        return self.error.message


async def failure(call: Any) -> Failure:
    """Await something that must fail with a documented status."""
    try:
        answer = await call
    except grpc.aio.AioRpcError as error:
        return failure_of(error)
    raise AssertionError(f"answered with {answer!r}")


def failure_of(error: grpc.aio.AioRpcError) -> Failure:
    meant = to_tandem_error(error)
    trailing = dict(error.trailing_metadata() or ())
    assert "grpc-status-details-bin" in trailing, f"not one of ours: {error.code()} {error.details()}"
    assert f"(error_id={meant.error_id})" in (error.details() or ""), error.details()
    status = rpc_status.from_call(cast(Any, error))
    return Failure(error.code().name, meant, error.details() or "", trailing, list(status.details))


async def drain(call: Any, result: Result | None = None) -> Result:
    """Read a stream to its end, whatever that is."""
    result = result or Result()
    while (event := await call.read()) is not grpc.aio.EOF:
        result.take(event)
    return result


async def read_all(call: Any) -> list[pb.StreamGenerateResponse]:
    """Every event of a stream, whatever it is."""
    return [event async for event in call]


# --- holding ---


class Gate:
    """Holds whoever comes through it, on an event loop or in a thread, until it is opened."""

    def __init__(self) -> None:
        self._is_open = threading.Event()
        self.num_arrived = 0
        self.num_passed = 0

    def open(self) -> None:
        self._is_open.set()

    def pass_thread(self) -> None:
        self.num_arrived += 1
        assert self._is_open.wait(PATIENCE_S)
        self.num_passed += 1

    async def pass_task(self) -> None:
        self.num_arrived += 1
        await until(self._is_open.is_set, PATIENCE_S)
        self.num_passed += 1


@contextmanager
def gate(owner: Any, name: str):
    """Hold the calls of a function that a thread makes."""
    held, original = Gate(), getattr(owner, name)

    def pass_then_call(*args: Any, **kwargs: Any) -> Any:
        held.pass_thread()
        return original(*args, **kwargs)

    setattr(owner, name, pass_then_call)
    try:
        yield held
    finally:
        held.open()
        setattr(owner, name, original)


@contextmanager
def gated_reads(decode: Any, *, before: bool = False):
    """Hold a decode worker's transfers behind their first chunk, or before they begin."""
    client = decode.worker._restorer._client
    held, original = Gate(), client.get

    async def get(*args: Any, **kwargs: Any):
        if before:
            await held.pass_task()
        async with aclosing(original(*args, **kwargs)) as chunks:
            async for chunk in chunks:
                yield chunk
                await held.pass_task()

    client.get = get
    try:
        yield held
    finally:
        held.open()
        client.get = original


@contextmanager
def gated_puts(prefill: Any):
    """Hold a prefill worker's hand-offs before they begin."""
    with gated_puts_of(prefill.worker._handoffs._context.client) as held:
        yield held


@contextmanager
def gated_puts_of(client: Any):
    """Hold what a client puts before it begins."""
    held, original = Gate(), client.put

    class Put:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._writer = original(*args, **kwargs)

        async def __aenter__(self) -> Any:
            await held.pass_task()
            return await self._writer.__aenter__()

        async def __aexit__(self, *error: Any) -> None:
            await self._writer.__aexit__(*error)

        @property
        def handle(self) -> Any:
            return self._writer.handle

    client.put = Put
    try:
        yield held
    finally:
        held.open()
        client.put = original


@contextmanager
def slowed(owner: Any, name: str, step_s: float):
    """Make a function of a compute thread take at least so long."""
    original, brake = getattr(owner, name), threading.Event()

    def wait_then_call(*args: Any) -> Any:
        brake.wait(step_s)
        return original(*args)

    setattr(owner, name, wait_then_call)
    try:
        yield
    finally:
        setattr(owner, name, original)


def slow_steps(decode: Any, step_s: float = 0.015):
    """Slow a decode worker's steps."""
    return slowed(decode.worker._decoder, "step", step_s)


def slow_runs(prefill: Any, run_s: float = 0.05):
    """Slow a prefill worker's chunks."""
    return slowed(prefill.worker._runner, "run", run_s)


# --- breaking ---


async def fall_silent(server: Any) -> None:
    """No more heartbeats, while the connections stay: a stopped process, or one that is cut off."""
    await server._host._link.close()


async def crash(server: Any) -> None:
    """No more heartbeats and no more connections: the process is gone."""
    await fall_silent(server)
    await server._host._server.stop(None)


@contextmanager
def corrupt_reads(cluster: LocalCluster, times: int):
    """Flip one bit in a payload the store sends, in its first `times` objects. Yields the flips made."""
    store = store_of(cluster)
    flips: list[object] = []
    original = store.read

    def read(lease: Any):
        messages = list(original(lease))
        if len(flips) < times:
            flips.append(lease.handle.key)
            damaged = bytearray(messages[1])
            damaged[-7] ^= 0x10
            messages[1] = bytes(damaged)
        yield from messages

    store.read = read
    try:
        yield flips
    finally:
        store.read = original


def restart_store(cluster: LocalCluster) -> None:
    """The store comes back empty: a new epoch, new books, nothing it gave out is known any more."""
    store = store_of(cluster)
    store._backend.close()
    store.__init__(store._backend, cluster.config.cache.store_bytes, store.config)
