"""A request that is cancelled or late in any stage says so, leaves nothing, and disturbs nobody."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager

import grpc
import pytest
import pytest_asyncio

from router.prefill_link import PrefillLink
from tandem.pb.worker.v1.worker_pb2 import KvSealed
from tests.e2e.harness import (
    BLOCK_BYTES,
    PATIENCE_S,
    Result,
    ask,
    cancel,
    complete,
    config,
    drain,
    failure,
    gate,
    gated_reads,
    generate,
    open_stream,
    quiesce,
    read_all,
    read_tokens,
    running,
    slow_steps,
    store_of,
    until,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

DECODE_BLOCKS = 40
STAGES = ("queue", "prefill", "chunk", "transfer", "decode")
LONG = {"max_tokens": 300, "ignore_eos": True}
MESSAGES = {
    "queue": ("DEADLINE_QUEUE", "deadline passed while queued"),
    "prefill": ("DEADLINE_PREFILL", "deadline passed in prefill"),
    "chunk": ("DEADLINE_PREFILL", "deadline passed in prefill"),
    "transfer": ("DEADLINE_TRANSFER", "deadline passed moving KV"),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster():
    """Room for two long requests, and prompts of more than 64 tokens in chunks."""
    early = {"overlap_bytes": 3 * BLOCK_BYTES}
    settings = config(decode_blocks=DECODE_BLOCKS, prefill={"token_budget": 64}, kvstore=early)
    async with running(settings) as started:
        yield started


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def _nothing_left_behind(cluster):
    yield
    await quiesce(cluster)
    assert (await complete(cluster, ask("next", max_tokens=3, ignore_eos=True))).reason == "LENGTH"
    await quiesce(cluster)


@asynccontextmanager
async def holding(cluster, stage):
    """Requests get as far as this stage and stay there. Yields (prompt, tokens sent by then, arrived)."""
    [prefill], [decode] = cluster.prefills, cluster.decodes
    dispatcher = cluster.router.dispatcher
    async with AsyncExitStack() as stack:
        match stage:
            case "queue":
                call = await stack.enter_async_context(occupied(cluster))
                yield "short", 0, lambda: len(dispatcher.planner._queue) == 1
                call.cancel()
            case "prefill":
                held = stack.enter_context(gate(prefill.worker._runner, "run"))
                yield "short", 0, lambda: held.num_arrived
            case "chunk":  # the second of three; the KV of the first is on its way to the store
                held = stack.enter_context(second_call_gated(prefill.worker._runner, "run"))
                yield "x" * 150, 0, lambda: held.num_arrived and store_of(cluster).audit().owned
            case "transfer":
                held = stack.enter_context(gated_reads(decode))
                yield "short", 1, lambda: held.num_arrived
            case "decode":
                stack.enter_context(slow_steps(decode, 0.03))
                yield "short", 3, lambda: decode.worker.num_running == 1


@asynccontextmanager
async def occupied(cluster):
    """Somebody holds nearly all decode blocks."""
    with slow_steps(cluster.decodes[0]):
        call = open_stream(cluster, ask("x" * 200, **LONG))
        await read_tokens(call, Result(), 1)
        other = open_stream(cluster, ask("x" * 100, max_tokens=20, ignore_eos=True))
        await read_tokens(other, Result(), 1)
        try:
            yield call
        finally:
            call.cancel()
            other.cancel()


@contextmanager
def second_call_gated(owner, name):
    """Let one call through, and hold those after it."""
    original = getattr(owner, name)
    is_first = [True]
    with gate(owner, name) as held:
        gated = getattr(owner, name)

        def call(*args):
            if is_first:
                is_first.clear()
                return original(*args)
            return gated(*args)

        setattr(owner, name, call)
        yield held


@pytest.mark.parametrize("stage", STAGES)
async def test_a_client_that_leaves(cluster, stage):
    async with holding(cluster, stage) as (prompt, num_tokens, arrived):
        call = open_stream(cluster, ask(prompt, **LONG))
        await read_tokens(call, Result(), num_tokens)
        await until(arrived)
        call.cancel()
        await until(lambda: cluster.router.dispatcher.num_flights <= (2 if stage == "queue" else 0), 1.0)


@pytest.mark.parametrize("stage", STAGES)
async def test_a_unary_client_that_leaves(cluster, stage):
    async with holding(cluster, stage) as (prompt, _, arrived):
        call = asyncio.create_task(generate(cluster, ask(prompt, **LONG)))
        await until(arrived)
        call.cancel()
        await until(lambda: cluster.router.dispatcher.num_flights <= (2 if stage == "queue" else 0), 1.0)


async def test_leaving_before_the_handle_has_arrived(cluster, monkeypatch):
    """The worker's call has ended well, so only the router can tell that nobody will fetch the KV."""
    is_lost = asyncio.Event()

    async def keep_handle_back(link, work, on_news):
        def take(news):
            if isinstance(news, KvSealed):
                is_lost.set()
            else:
                on_news(news)

        await prefill(link, work, take)
        await asyncio.Event().wait()

    prefill = PrefillLink.prefill
    monkeypatch.setattr(PrefillLink, "prefill", keep_handle_back)
    call = open_stream(cluster, ask("short", **LONG))
    await asyncio.wait_for(is_lost.wait(), PATIENCE_S)
    assert store_of(cluster).audit().owned
    call.cancel()
    await quiesce(cluster)
    monkeypatch.undo()


@pytest.mark.parametrize("stage", STAGES)
async def test_cancelling_by_name(cluster, stage):
    async with holding(cluster, stage) as (prompt, num_tokens, arrived):
        call = open_stream(cluster, ask(prompt, request_id="mine", **LONG))
        result = await read_tokens(call, Result(), num_tokens)
        await until(arrived)
        await cancel(cluster, "mine")
        failed = await asyncio.wait_for(failure(drain(call, result)), PATIENCE_S / 2)

    assert (failed.code, failed.reason) == ("CANCELLED", "CLIENT_CANCELLED")
    assert failed.message == "cancelled by client"
    assert (await failure(cancel(cluster, "mine"))).reason == "NO_SUCH_REQUEST"


@pytest.mark.parametrize("stage", STAGES)
async def test_a_deadline_in_each_stage(cluster, stage):
    async with holding(cluster, stage) as (prompt, num_tokens, arrived):
        call = open_stream(cluster, ask(prompt, timeout_s=1.0, **LONG))
        result = await read_tokens(call, Result(), num_tokens)
        await until(arrived)
        failed = await asyncio.wait_for(failure(drain(call, result)), PATIENCE_S / 2)

    sent = len(result.token_ids)
    assert failed.code == "DEADLINE_EXCEEDED"
    assert failed.error.metadata["tokens_delivered"] == str(sent)
    if stage == "decode":
        assert sent >= num_tokens
        assert (failed.reason, failed.message) == (
            "DEADLINE_DECODE",
            f"deadline passed decoding ({sent} tokens sent)",
        )
    else:
        assert sent == num_tokens
        assert (failed.reason, failed.message) == MESSAGES[stage]


@pytest.mark.parametrize("stage", ["prefill", "decode"])
async def test_the_deadline_of_the_call_counts_too(cluster, stage):
    """gRPC itself answers the client then; what matters is that the service lets go."""
    from tandem.pb.v1 import generation_pb2 as pb
    from tandem.pb.v1 import generation_pb2_grpc

    stub = generation_pb2_grpc.GenerationServiceStub(cluster.channel)
    async with holding(cluster, stage) as (prompt, _, _):
        call = stub.StreamGenerate(pb.StreamGenerateRequest(input=ask(prompt, **LONG)), timeout=0.5)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await drain(call)
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: cluster.router.dispatcher.num_flights == 0)


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, 0.0005])
async def test_a_deadline_that_has_passed_on_arrival(cluster, timeout_s):
    failed = await failure(complete(cluster, ask("late", timeout_s=timeout_s)))

    assert (failed.code, failed.reason) == ("DEADLINE_EXCEEDED", "DEADLINE_QUEUE")


async def test_cancelling_one_of_several_requests_leaves_the_others_alone(cluster):
    plain = await complete(cluster, ask("undisturbed", max_tokens=60, ignore_eos=True))
    sending = asyncio.create_task(complete(cluster, ask("undisturbed", max_tokens=60, ignore_eos=True)))
    for index in range(6):
        call = open_stream(cluster, ask(f"gone {index}", request_id=f"gone-{index}", max_tokens=40))
        await read_tokens(call, Result(), index % 3)
        call.cancel()

    assert (await sending).token_ids == plain.token_ids


async def test_cancelling_by_name_ends_all_completions(cluster):
    with slow_steps(cluster.decodes[0]):
        call = open_stream(
            cluster, ask("many", request_id="many", n=4, max_tokens=100, temperature=1.0, ignore_eos=True)
        )
        await until(lambda: cluster.decodes[0].worker.num_running == 4)
        await cancel(cluster, "many")
        failed = await failure(read_all(call))

    assert failed.reason == "CLIENT_CANCELLED"


async def test_blocks_stay_taken_while_a_cancelled_transfer_still_writes(cluster):
    """Nobody else may get them before the last write: I6, B8."""
    [decode] = cluster.decodes
    with gate(decode.worker._restorer._cache, "write_blocks") as held:
        call = open_stream(cluster, ask("hello", request_id="writing", **LONG))
        await read_tokens(call, Result(), 1)
        await until(lambda: held.num_arrived)
        await cancel(cluster, "writing")
        await until(lambda: cluster.router.dispatcher.num_flights == 0)
        await asyncio.sleep(0.2)
        during = decode.worker.audit()
        held.open()

    assert during.owned == 20  # 305 tokens
    assert during.is_balanced


async def test_a_storm_of_cancels_leaves_nothing(cluster):
    async def leave_after(index):
        call = open_stream(cluster, ask("x" * (1 + index * 7 % 90), max_tokens=50, ignore_eos=True))
        await asyncio.sleep(0.004 * (index % 25))
        call.cancel()

    await asyncio.gather(*(leave_after(index) for index in range(100)))
