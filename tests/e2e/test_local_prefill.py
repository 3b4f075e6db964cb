"""Short prompts that stay with the decode worker where that costs less: same tokens, said and counted."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest

from router.disaggregation import MIN_MEASURED
from tests.e2e.harness import (
    MIB,
    Result,
    ask,
    complete,
    config,
    crash,
    gate,
    open_stream,
    quiesce,
    read_tokens,
    running,
    slow_runs,
    slow_steps,
    store_of,
    until,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

MORE = {"max_tokens": 12, "ignore_eos": True}


@asynccontextmanager
async def learnt(num_decode=1, **parts):
    """A service that has seen enough requests to compare both ways."""
    router = {"disaggregate": "auto", "local_prefill_tokens": 64, "default_timeout_s": 20.0}
    settings = config(router=router, **parts)
    async with running(settings, 1, num_decode) as cluster:
        for index in range(MIN_MEASURED):
            found = (await complete(cluster, ask(f"first {index}", **MORE))).finished.timings
            assert found.placement == "split/unmeasured"
        costs_of(cluster).handoff_s = 5.0
        yield cluster


def costs_of(cluster):
    """What the router has learnt: a test says it, so that noise decides nothing."""
    return cluster.router.dispatcher.planner._placement._disaggregation._costs


def placement(result):
    return result.finished.timings.placement


async def test_without_the_setting_every_prompt_is_split(cluster):
    assert placement(await complete(cluster, ask("x", **MORE))) == "split/always"


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 5, "frequency_penalty": 0.5}])
async def test_the_tokens_are_those_of_the_split(cluster, sampling):
    async with learnt() as other:
        for length in (1, 20, 64):
            message = {"prompt": "abcdefg" * 10, **MORE, **sampling}
            prompt = message.pop("prompt")[:length]
            wanted = await complete(cluster, ask(prompt, **message))
            found = await complete(other, ask(prompt, **message))
            assert placement(found) == "local/cheaper"
            assert (found.token_ids, found.text) == (wanted.token_ids, wanted.text)
            parts = found.finished.timings
            assert parts.kv_read_ms == parts.transfer_ms == 0 < parts.prefill_ms
        assert store_of(other).counters.sealed == MIN_MEASURED


async def test_a_decode_worker_says_what_a_prompt_token_takes():
    async with learnt() as other:
        load_of = other.router.dispatcher.planner._admission.load_of
        assert load_of("decode-0").prompt_token_s == 0, "it has computed none"
        assert placement(await complete(other, ask("x" * 40, **MORE))) == "local/cheaper"
        await until(lambda: load_of("decode-0").prompt_token_s > 0)
        assert load_of("prefill-0").prompt_token_s == load_of("nobody").prompt_token_s == 0


async def test_long_prompts_are_split_and_the_queue_decides_for_short_ones():
    async with learnt() as cluster:
        assert placement(await complete(cluster, ask("x" * 65, **MORE))) == "split/long"
        with slow_steps(cluster.decodes[0], 0.03):
            costs_of(cluster).handoff_s = 1e-6
            call = open_stream(cluster, ask("runs", max_tokens=60, ignore_eos=True))
            await read_tokens(call, Result(), 2)
            beside = [
                asyncio.create_task(complete(cluster, ask("y" * 60, max_tokens=2, ignore_eos=True)))
                for _ in range(6)
            ]
            places = {placement(await each) for each in beside}
            call.cancel()
        assert "split/cheaper" in places, "running sequences are worth the hand-off"
        counted = cluster.router.dispatcher.metrics.exposition().decode()
        assert 'tandem_placements_total{placement="split",reason="long"} 1.0' in counted


async def test_a_busy_prefill_worker_is_passed_by():
    async with learnt() as cluster:
        with slow_runs(cluster.prefills[0], 0.3):
            long = asyncio.create_task(complete(cluster, ask("x" * 200, **MORE)))
            await until(
                lambda: cluster.prefills[0].worker.num_running or cluster.prefills[0].worker.num_waiting
            )
            assert placement(await complete(cluster, ask("short", **MORE))) == "local/cheaper"
            assert not long.done()
            await long


async def test_a_decode_worker_that_dies_while_it_computes_a_prompt():
    async with learnt(2) as cluster:
        wanted = (await complete(cluster, ask("wanted", **MORE))).token_ids
        with slow_steps(cluster.decodes[0], 0.02), slow_steps(cluster.decodes[1], 0.02):
            sending = asyncio.create_task(complete(cluster, ask("wanted", **MORE)))
            await until(lambda: any(d.worker.audit().owned for d in cluster.decodes))
            busy = next(d for d in cluster.decodes if d.worker.audit().owned)
            await crash(busy)
            assert (await sending).token_ids == wanted


async def test_who_leaves_gives_everything_back():
    async with learnt() as cluster:
        with slow_steps(cluster.decodes[0], 0.02):
            for num_tokens in (0, 1, 3):
                call = open_stream(cluster, ask("leaving", max_tokens=100, ignore_eos=True))
                await read_tokens(call, Result(), num_tokens)
                call.cancel()
                await quiesce(cluster)


async def test_without_any_split_long_prompts_are_computed_there_too(cluster):
    settings = config(router={"disaggregate": "never", "default_timeout_s": 20.0})
    async with running(settings) as other:
        for length in (1, 150, 400):
            prompt = ("abcdefg" * 60)[:length]
            found = await complete(other, ask(prompt, **MORE))
            assert placement(found) == "local/never"
            assert found.token_ids == (await complete(cluster, ask(prompt, **MORE))).token_ids
        assert store_of(other).counters.reserved == 0


async def test_what_each_side_has_cached_decides(cluster):
    """A prompt that is new goes where others find it again; known ones where most of it is."""
    prompt = "abcdefg" * 9
    wanted = (await complete(cluster, ask(prompt, **MORE))).token_ids
    kvstore = {"prefix_tokens": 16}
    async with learnt(cache={"prefix_bytes": 4 * MIB}, kvstore=kvstore) as other:
        costs = costs_of(other)
        costs.handoff_s, costs.split_s_per_token, costs.local_s_per_token = 0.5, 1.0, 1.02
        places = []
        for _ in range(2):
            found = await complete(other, ask(prompt, **MORE))
            places.append(placement(found))
            assert found.token_ids == wanted
            await until(lambda: not other.prefills[0].worker.num_running)
            costs.handoff_s, costs.split_s_per_token, costs.local_s_per_token = 0.5, 1.0, 1.02
        assert places == ["split/cacheable", "local/cached"], "the hand-off is worth more than 15 tokens"
        assert found.finished.usage.cached == 48, "the decode worker restored them"
    async with learnt(cache={"keep_blocks": True}, kvstore=kvstore) as other:
        costs = costs_of(other)
        places = []
        for _ in range(2):
            costs.handoff_s, costs.split_s_per_token, costs.local_s_per_token = 0.01, 1.0, 1.5
            found = await complete(other, ask(prompt, **MORE))
            places.append(placement(found))
            assert found.token_ids == wanted
        assert places == ["split/cheaper", "local/cached"]


async def test_a_prompt_that_waits_at_the_decode_worker_speaks_for_the_split():
    """The line there is the router's own count: it grows with each that stays and shrinks with its token."""
    async with learnt() as cluster:
        costs = costs_of(cluster)
        costs.handoff_s, costs.split_s_per_token, costs.local_s_per_token = 50.0, 1.0, 1.0
        loads = cluster.router.dispatcher.planner._placement._disaggregation.loads
        with gate(cluster.decodes[0].worker._prompts, "step") as held:
            first = asyncio.create_task(complete(cluster, ask("x" * 60, **MORE)))
            await until(lambda: held.num_arrived)
            assert loads.tokens_before("decode-0", 1000) == 60
            second = asyncio.create_task(complete(cluster, ask("y" * 61, **MORE)))
            await until(lambda: loads._num_sequences["decode-0"] == 2)
        assert placement(await first) == "local/cheaper"
        assert placement(await second) == "split/cheaper", "60 tokens in line are more than the hand-off"
        await until(lambda: not loads.tokens_before("decode-0", 1000))
