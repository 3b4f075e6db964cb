"""Streams that are lost on the way, taken up again by the client: as if nothing had been."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
from contextlib import closing

import pytest
import pytest_asyncio

from deploy.embedded import EmbeddedService
from tandem.client import TandemClient, generation_input
from tandem.errors import InvalidRequest, NotFound, TandemError, Unavailable
from tandem.sampling import SamplingParams
from tandem.sync_client import SyncTandemClient
from tests.e2e.harness import Result, config, failure, generate, quiesce, running, slow_steps
from tests.road import road_to

in_module = pytest.mark.asyncio(loop_scope="module")

NUM_TOKENS = 60
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
SAMPLINGS = [
    GREEDY,
    SamplingParams(max_tokens=NUM_TOKENS, temperature=1.0, seed=5),
    SamplingParams(max_tokens=NUM_TOKENS, temperature=1.0, seed=5, presence_penalty=1.0, logprobs=2),
    SamplingParams(max_tokens=NUM_TOKENS, temperature=0.8, seed=6, min_tokens=30, stop=("ab", "e")),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster():
    settings = config(speculation={"draft": "ngram"})
    async with running(settings) as started:
        yield started


async def collect(client, sampling, cuts=(), do=None, **options):
    """One stream, which is lost when so many tokens have come. Positions are checked by `Result`."""
    result, cuts = Result(), sorted(cuts)
    async for event in client.stream("a story", sampling, **options):
        result.take(event)
        while cuts and len(result.token_ids) >= cuts[0]:
            cuts.pop(0)
            do()
    return result


@in_module
@pytest.mark.parametrize("sampling", SAMPLINGS)
async def test_a_stream_that_is_lost_again_and_again_is_whole(cluster, sampling):
    async with TandemClient(cluster.address) as client:
        wanted = await collect(client, sampling)
    cuts = random.Random(3).sample(range(1, NUM_TOKENS), 5)
    with slow_steps(cluster.decodes[0], 0.002):
        async with road_to(cluster.address) as (road, address), TandemClient(address) as client:
            name = f"named-{SAMPLINGS.index(sampling)}"
            found = await collect(client, sampling, cuts, road.cut, request_id=name)

    assert road.num_breaks > 1
    assert (found.token_ids, found.text) == (wanted.token_ids, wanted.text)
    assert found.reason == wanted.reason
    assert found.finished.usage.completion == len(wanted.token_ids)
    assert [entry.logprob for entry in found.logprobs] == pytest.approx([e.logprob for e in wanted.logprobs])
    await quiesce(cluster)


@in_module
async def test_a_seed_nobody_gave_stays_the_same(cluster):
    """Were it another, the repeated tokens would differ, and the stream would end as broken."""
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=1.0, ignore_eos=True)
    async with road_to(cluster.address) as (road, address), TandemClient(address) as client:
        found = await collect(client, sampling, [5, 20], road.cut)
    assert len(found.token_ids) == NUM_TOKENS


@in_module
async def test_who_does_not_want_that_is_told(cluster):
    async with road_to(cluster.address) as (road, address), TandemClient(address) as client:
        with slow_steps(cluster.decodes[0], 0.002), pytest.raises(TandemError) as raised:
            await collect(client, GREEDY, [5], road.cut, resume_s=0)
    assert not isinstance(raised.value, InvalidRequest)
    await quiesce(cluster)


@in_module
async def test_the_blocking_client_does_the_same(cluster):
    loop = asyncio.get_running_loop()

    def follow(address, cut):
        result, at = Result(), 10
        with SyncTandemClient(address) as client:
            for event in client.stream("a story", GREEDY):
                result.take(event)
                if at <= len(result.token_ids):
                    at += 1000
                    loop.call_soon_threadsafe(cut)
        return result

    wanted = await asyncio.to_thread(follow, cluster.address, lambda: None)
    with slow_steps(cluster.decodes[0], 0.002):
        async with road_to(cluster.address) as (road, address):
            found = await asyncio.to_thread(follow, address, road.cut)
    assert road.num_breaks == 2
    assert (found.token_ids, found.text) == (wanted.token_ids, wanted.text)
    await quiesce(cluster)


@in_module
async def test_the_blocking_client_makes_every_call_and_leaves_as_it_should(cluster):
    def use():
        with SyncTandemClient(cluster.address) as client:
            [model] = client.models()
            answer = client.generate("a story", GREEDY)
            with pytest.raises(NotFound):
                client.cancel("nobody")
            with pytest.raises(InvalidRequest), closing(client.stream("x" * 600)) as events:
                next(events)
            with closing(client.stream("a story", GREEDY)) as events:
                next(events)
        with SyncTandemClient("127.0.0.1:1") as nobody, pytest.raises(Unavailable, match="no answer"):
            nobody.models()
        return model, answer

    async with TandemClient(cluster.address) as client:
        wanted = await client.generate("a story", GREEDY), await client.models()
    model, answer = await asyncio.to_thread(use)
    assert [model] == wanted[1]
    assert answer.completions[0].token_ids == wanted[0].completions[0].token_ids
    await quiesce(cluster)


@in_module
@pytest.mark.parametrize(
    ("delivered", "sampling"),
    [
        ([300], GREEDY),
        ([1] * NUM_TOKENS, GREEDY),
        ([1], SamplingParams(temperature=1.0)),
        ([1], SamplingParams(n=2)),
    ],
)
async def test_what_cannot_be_resumed_is_refused(cluster, delivered, sampling):
    message = generation_input("x", sampling)
    message.delivered_token_ids.extend(delivered)
    assert (await failure(generate(cluster, message))).reason == "BAD_PARAM"


@pytest.mark.e2e
@pytest.mark.timeout(180)
async def test_a_router_that_is_killed_and_started_again_on_its_port_goes_on():
    """O1: the whole service dies with its router; the next one has its port and nothing else of it."""
    long = SamplingParams(max_tokens=400, ignore_eos=True, temperature=1.0, seed=4)
    async with EmbeddedService(config()) as first:
        address = first.address
        port = int(address.rpartition(":")[2])
        async with TandemClient(address) as client:
            wanted = await collect(client, long)
            killed = threading.Event()

            def kill():
                os.kill(first.pids()["router"], signal.SIGKILL)
                killed.set()

            following = asyncio.create_task(collect(client, long, [50], kill, resume_s=60))
            await asyncio.to_thread(killed.wait)
            async with EmbeddedService(config(router={"port": port})):
                found = await following
    assert (found.token_ids, found.text) == (wanted.token_ids, wanted.text)
    assert len(found.admitted) == 2
