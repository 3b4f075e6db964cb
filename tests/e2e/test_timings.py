"""What a client is told about where the time went, against what it measured itself."""

from __future__ import annotations

import asyncio
import time

import pytest
import pytest_asyncio

from tests.e2e.harness import (
    Result,
    ask,
    complete,
    drain,
    gated_reads,
    open_stream,
    quiesce,
    read_tokens,
    slow_steps,
    until,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

PARTS = ("queue_ms", "prefill_ms", "kv_write_ms", "kv_wait_ms", "kv_read_ms", "first_decode_ms", "decode_ms")


def parts_of(finished):
    return {name: getattr(finished.timings, name) for name in PARTS}


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def _nothing_left_behind(cluster):
    yield
    await quiesce(cluster)


@pytest.mark.parametrize("num_tokens", [1, 2, 40])
async def test_the_parts_sum_to_what_the_client_measured(cluster, num_tokens):
    await complete(cluster, ask("warm", max_tokens=2))
    best_ms = float("inf")  # of ten, as others use this machine too
    for _ in range(10):
        began_s = time.monotonic()
        result = await complete(cluster, ask("hello there", max_tokens=num_tokens, ignore_eos=True))
        seen_ms = 1e3 * (time.monotonic() - began_s)
        parts = parts_of(result.finished)

        assert sum(parts.values()) == pytest.approx(result.finished.timings.total_ms, abs=1e-6)
        assert min(parts.values()) >= 0
        assert result.finished.timings.total_ms <= seen_ms
        best_ms = min(best_ms, seen_ms - result.finished.timings.total_ms)

    assert best_ms < 15


async def test_a_request_without_decode_has_no_transfer_time(cluster):
    parts = parts_of((await complete(cluster, ask("hello", max_tokens=1))).finished)

    assert parts["prefill_ms"] > 0
    assert [parts[name] for name in PARTS[2:6]] == [0, 0, 0, 0]


async def test_time_is_charged_to_the_part_that_took_it(cluster):
    [decode] = cluster.decodes
    with gated_reads(decode) as held:
        sending = asyncio.create_task(complete(cluster, ask("hello", max_tokens=3, ignore_eos=True)))
        await until(lambda: held.num_arrived)
        await asyncio.sleep(0.3)
        held.open()
        reading = parts_of((await sending).finished)
    with slow_steps(decode, 0.1):
        decoding = parts_of((await complete(cluster, ask("hello", max_tokens=5, ignore_eos=True))).finished)

    assert reading["kv_read_ms"] > 290
    assert max(reading, key=reading.get) == "kv_read_ms"
    assert decoding["decode_ms"] > 290
    assert decoding["first_decode_ms"] > 95
    assert max(decoding, key=decoding.get) == "decode_ms"


async def test_usage_counts_prompt_and_completion_tokens(cluster):
    for prompt, length in (("x", 1), ("hello", 5), ("é", 2), ([1, 2, 3], 3)):
        finished = (await complete(cluster, ask(prompt, max_tokens=4, ignore_eos=True))).finished

        assert (finished.usage.prompt, finished.usage.completion) == (length, 4)


async def test_admission_names_the_pair_and_the_bytes(cluster):
    [admitted] = (await complete(cluster, ask("hello", request_id="named", max_tokens=20))).admitted

    assert (admitted.request_id, admitted.prompt_tokens) == ("named", 5)
    assert (admitted.prefill_worker, admitted.decode_worker) == ("prefill-0", "decode-0")
    assert admitted.reserved_bytes == 2 * 8192  # 25 tokens in blocks of 16, 512 bytes each


async def test_the_first_token_does_not_wait_for_the_transfer(cluster):
    with gated_reads(cluster.decodes[0]) as held:
        call = open_stream(cluster, ask("hello", max_tokens=3, ignore_eos=True))
        result = await read_tokens(call, Result(), 1)
        held.open()
        await drain(call, result)

    assert len(result.token_ids) == 3
