"""The door and the queue behind it: what is refused at once, what waits, and who goes first."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import pytest_asyncio
from google.rpc import error_details_pb2

from router import planner
from tests.checkpoints import EOS
from tests.e2e.harness import (
    PATIENCE_S,
    Result,
    ask,
    cancel,
    complete,
    config,
    crash,
    failure,
    generate,
    open_stream,
    quiesce,
    read_tokens,
    running,
    slow_steps,
    stream,
    until,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

DECODE_BLOCKS = 24
MAX_QUEUE = 6


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster():
    settings = config(
        prefill_blocks=16, decode_blocks=DECODE_BLOCKS, store_blocks=20, router={"max_queue": MAX_QUEUE}
    )
    async with running(settings) as started:
        yield started


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def _nothing_left_behind(cluster):
    yield
    await quiesce(cluster)


@asynccontextmanager
async def occupying(cluster, num_blocks):
    """One long request that holds so many decode blocks until the context ends."""
    async with AsyncExitStack() as stack:
        stack.enter_context(slow_steps(cluster.decodes[0], 0.01))
        call = open_stream(cluster, ask("x", max_tokens=16 * num_blocks - 1, ignore_eos=True))
        stack.callback(call.cancel)
        await read_tokens(call, Result(), 2)
        yield call


def num_waiting(cluster):
    return len(cluster.router.dispatcher.planner._queue)


def blocks(count):
    """Behind a prompt of one token this needs so many decode blocks, but ends after four tokens."""
    return {"max_tokens": 16 * count - 1, "logit_bias": {EOS: 100.0}, "min_tokens": 3}


# --- refused at once ---


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ("x" * 10, 400, "request needs 26 KV blocks; the largest worker has 24"),
        ("x" * 257, 1, "request needs 17 KV blocks for its prompt; the largest prefill worker has 16"),
    ],
)
async def test_what_can_never_fit_is_refused_with_the_figures(cluster, prompt, max_tokens, message):
    async with occupying(cluster, 20):  # a full service says so just as fast
        failed = await failure(complete(cluster, ask(prompt, max_tokens=max_tokens)))

        assert cluster.router.dispatcher.num_flights == 1, "nobody had to end first"
        assert (failed.code, failed.reason, failed.message) == ("INVALID_ARGUMENT", "NEVER_FITS", message)
        assert failed.error.retry_after_ms is None


async def test_what_the_store_can_never_hold_is_refused_with_the_figures():
    async with running(config(store_blocks=2)) as small:
        failed = await failure(complete(small, ask("x" * 33, max_tokens=1)))

    assert failed.reason == "NEVER_FITS"
    assert failed.message == "request needs 24576 bytes of KV store; the store has 16384"


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ("x" * 600, {"max_tokens": 5}, "prompt is 600 tokens; the limit is 512 minus max_tokens 5"),
        ("x" * 500, {"max_tokens": 13}, "prompt is 500 tokens; the limit is 512 minus max_tokens 13"),
        ("x" * 512, {}, "prompt is 512 tokens; the limit is 512 minus max_tokens 1"),
        ("x", {"max_tokens": 2**32 - 1}, "prompt is 1 tokens; the limit is 512 minus max_tokens 4294967295"),
    ],
)
async def test_a_prompt_that_is_too_long_is_refused_with_the_figures(cluster, prompt, sampling, message):
    failed = await failure(complete(cluster, ask(prompt, **sampling)))

    assert (failed.code, failed.reason, failed.message) == ("INVALID_ARGUMENT", "PROMPT_TOO_LONG", message)


async def test_a_full_queue_refuses_with_a_hint(cluster):
    async with occupying(cluster, 20):
        waiting = [asyncio.create_task(complete(cluster, ask("x", **blocks(10)))) for _ in range(MAX_QUEUE)]
        await until(lambda: num_waiting(cluster) == MAX_QUEUE)
        failed = await failure(complete(cluster, ask("x", **blocks(10))))
        assert num_waiting(cluster) == MAX_QUEUE, "nobody had to leave first"
        for task in waiting:
            task.cancel()

    hint_ms = failed.error.retry_after_ms
    assert (failed.code, failed.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
    assert failed.message == f"server is full; retry in {hint_ms} ms"
    assert failed.trailing["retry-after-ms"] == str(hint_ms)
    assert hint_ms >= 50
    assert retry_info_ms(failed) == hint_ms


def retry_info_ms(failed):
    found = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(found) for detail in failed.details)
    return found.retry_delay.ToMilliseconds()


async def test_a_name_is_in_use_until_its_request_has_ended(cluster):
    many = {"n": 2, "temperature": 1.0}
    with slow_steps(cluster.decodes[0]):
        for first, second in (({}, {}), ({}, many), (many, {}), (many, many)):
            taken = {"request_id": "taken", "max_tokens": 60, "ignore_eos": True}
            call = open_stream(cluster, ask("x", **taken, **first))
            await until(lambda: cluster.decodes[0].worker.num_running)
            asked = {"x": {**taken, **second}, "y": {"request_id": "taken", "max_tokens": 1, **second}}
            for prompt, params in asked.items():
                failed = await failure(stream(cluster, ask(prompt, **params)))
                is_same = prompt == "x" and first == second
                reason = "ID_IN_USE" if is_same else "ID_REUSED_DIFFERENT_BODY"
                assert (failed.code, failed.reason) == ("ALREADY_EXISTS", reason)
                assert failed.message.startswith("request_id is already running")
            call.cancel()
            await until(lambda: cluster.router.dispatcher.num_flights == 0)


async def test_who_asks_again_under_a_name_gets_the_same_answer(cluster):
    """Though it was drawn with a seed that nobody named; another request under that name is refused."""

    async def texts(**named):
        asked = ask("x", n=2, max_tokens=16, temperature=1.0, ignore_eos=True, **named)
        return [result.token_ids for result in await stream(cluster, asked)]

    first = await texts(request_id="again")
    assert await texts(request_id="again") == first != await texts()
    assert b"tandem_repeats_total 1.0" in cluster.router.dispatcher.metrics.exposition()
    failed = await failure(stream(cluster, ask("y", request_id="again", max_tokens=1)))
    assert (failed.code, failed.reason) == ("ALREADY_EXISTS", "ID_REUSED_DIFFERENT_BODY")


async def test_a_name_is_free_when_its_request_was_left(cluster):
    with slow_steps(cluster.decodes[0]):
        call = open_stream(cluster, ask("x", request_id="left", max_tokens=60, ignore_eos=True))
        await read_tokens(call, Result(), 2)
        call.cancel()
        await until(lambda: cluster.router.dispatcher.num_flights == 0)
    assert (await complete(cluster, ask("y", request_id="left", max_tokens=1))).token_ids


# --- waits ---


async def test_what_does_not_fit_now_fits_later(cluster):
    async with occupying(cluster, 20) as call:
        later = asyncio.create_task(complete(cluster, ask("x", **blocks(10))))
        await until(lambda: num_waiting(cluster) == 1)
        await asyncio.sleep(0.1)
        call.cancel()
        result = await later

    assert result.finished.timings.queue_ms > 95
    assert len(result.token_ids) == 4


async def test_a_small_request_passes_a_big_one_that_does_not_fit(cluster):
    async with occupying(cluster, 14) as call:
        big = asyncio.create_task(complete(cluster, ask("x", **blocks(12))))
        await until(lambda: num_waiting(cluster) == 1)
        small = await complete(cluster, ask("x", **blocks(2)))

        assert len(small.token_ids) == 4
        assert not big.done()
        call.cancel()
        assert len((await big).token_ids) == 4


async def test_higher_priorities_go_first(cluster):
    async with occupying(cluster, 20) as call:
        order = []

        async def send(priority):
            result = await complete(cluster, ask("x", priority=priority, **blocks(13)))
            order.append((priority, result.finished.timings.queue_ms))

        tasks = []
        for priority in (-2, 0, 5, 1):
            tasks.append(asyncio.create_task(send(priority)))
            await until(lambda: num_waiting(cluster) == len(tasks))
        call.cancel()
        await asyncio.gather(*tasks)

    assert [priority for priority, _ in order] == [5, 1, 0, -2]


async def test_more_completions_than_fit_at_once_wait_for_each_other(cluster):
    response = await generate(cluster, ask("x", n=5, temperature=1.0, seed=3, **blocks(9)))

    assert [len(completion.token_ids) for completion in response.completions] == [4] * 5
    assert max(completion.finished.timings.queue_ms for completion in response.completions) > 0


async def test_completions_that_find_the_queue_full_end_all_of_them(cluster):
    async with occupying(cluster, 20):
        failed = await failure(generate(cluster, ask("x", n=8, request_id="eight", **blocks(10))))

        assert failed.reason == "QUEUE_FULL"
        await until(lambda: cluster.router.dispatcher.num_flights == 1)
        assert num_waiting(cluster) == 0
        assert (await failure(cancel(cluster, "eight"))).reason == "NO_SUCH_REQUEST"


# --- no worker ---


@pytest.mark.parametrize(
    ("role", "reason", "message"),
    [
        ("prefills", "NO_PREFILL", "no prefill worker is available; retry in 1000 ms"),
        ("decodes", "NO_DECODE", "no decode worker is available; retry in 1000 ms"),
    ],
)
async def test_without_a_worker_requests_wait_a_while_and_no_longer(monkeypatch, role, reason, message):
    monkeypatch.setattr(planner, "WORKER_WAIT_S", 1.0)
    async with running(config(router={"prefill_fallback": False})) as cluster:
        [worker] = getattr(cluster, role)
        await crash(worker)
        await until(lambda: not cluster.router.is_ready)
        began_s = time.monotonic()
        waiting = await asyncio.gather(*(failure(complete(cluster, ask("x"))) for _ in range(3)))
        waited_s = time.monotonic() - began_s
        at_once = await failure(complete(cluster, ask("x")))

        for failed in (*waiting, at_once):
            assert (failed.code, failed.reason, failed.message) == ("UNAVAILABLE", reason, message)
            assert failed.error.retry_after_ms == 1000
        assert waited_s < PATIENCE_S / 2
        assert len({failed.error.error_id for failed in waiting}) == 3


async def test_a_worker_that_comes_in_time_serves_who_waited():
    async with running() as cluster:
        wanted = await complete(cluster, ask("x", max_tokens=20))
        await crash(cluster.decodes[0])
        await until(lambda: not cluster.router.is_ready)
        waiting = asyncio.create_task(complete(cluster, ask("x", max_tokens=20)))
        await until(lambda: num_waiting(cluster) == 1)
        await cluster.add_decode("decode-0")

        assert (await waiting).token_ids == wanted.token_ids
