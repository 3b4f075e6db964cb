"""Policies on a running service: sessions stay together, and what is admitted fits to its end."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest

from router.registry import WorkerRole
from tandem.pb.v1 import generation_pb2 as pb
from tandem.pb.v1 import generation_pb2_grpc
from tests.e2e.harness import (
    PATIENCE_S,
    ask,
    complete,
    config,
    gated_reads,
    open_stream,
    quiesce,
    running,
    until,
)
from tests.web import send

SESSIONS = [f"session-{number}" for number in range(8)]


@asynccontextmanager
async def two_decodes(settings):
    """A cluster whose router knows both decode workers."""
    async with running(settings, num_decode=2) as cluster:
        await until(lambda: len(cluster.router.registry.ready(WorkerRole.DECODE)) == 2)
        yield cluster


async def worker_of(cluster, session: str) -> str:
    """Which decode worker a request of the session is given, by gRPC."""
    stub = generation_pb2_grpc.GenerationServiceStub(cluster.channel)
    message = pb.StreamGenerateRequest(input=ask("x", max_tokens=2))
    call = stub.StreamGenerate(message, timeout=PATIENCE_S, metadata=(("x-session-id", session),))
    events = [event async for event in call]  # to its end: what is held up later is held up alone
    return events[0].admitted.decode_worker


async def http_worker_of(cluster, session_header: str, body: str) -> str:
    """The same by HTTP, which does not say; but the router's books do, while the KV is held up."""
    await quiesce(cluster)
    with gated_reads(cluster.decodes[0], before=True), gated_reads(cluster.decodes[1], before=True):
        head = "POST /v1/completions HTTP/1.1\ncontent-type: application/json" + session_header
        reply = asyncio.create_task(send(cluster.http_address, head, body.encode()))

        def busy() -> list[str]:
            pools = cluster.router.dispatcher.audit()
            return [p.pool.removeprefix("decode:") for p in pools if p.owned and p.pool.startswith("decode:")]

        await until(busy)
        [worker] = busy()
    assert (await reply).status == 200
    return worker


async def test_a_session_meets_the_same_worker_by_either_front():
    patient = {"heartbeat_s": 5.0, "worker_timeout_s": 30.0}  # a busy machine makes no worker suspect
    settings = config(router={"policy": "session", "http_port": 0, **patient})
    async with two_decodes(settings) as cluster:
        homes = {session: await worker_of(cluster, session) for session in SESSIONS}
        assert set(homes.values()) == {"decode-0", "decode-1"}
        for session, home in homes.items():
            assert await worker_of(cluster, session) == home
        named, body = SESSIONS[0], '{"prompt": "x", "max_tokens": 3}'
        others = [session for session in SESSIONS if homes[session] != homes[named]]
        assert await http_worker_of(cluster, f"\nx-session-id: {named}", body) == homes[named]
        as_user = f'{{"prompt": "x", "max_tokens": 3, "user": "{named}"}}'
        assert await http_worker_of(cluster, "", as_user) == homes[named]
        assert await http_worker_of(cluster, f"\nx-session-id: {others[0]}", as_user) == homes[others[0]]


async def test_a_prompt_like_an_earlier_one_goes_where_that_was_decoded():
    settings = config(router={"policy": "kv-aware"}, kvstore={"prefix_tokens": 16})
    prompts = ([1] * 40, [2] * 40)
    async with two_decodes(settings) as cluster:
        with gated_reads(cluster.decodes[0], before=True), gated_reads(cluster.decodes[1], before=True):
            first = asyncio.create_task(complete(cluster, ask(prompts[0], max_tokens=4)))
            await until(lambda: cluster.router.dispatcher.num_flights)
            second = asyncio.create_task(complete(cluster, ask(prompts[1], max_tokens=4)))
            await until(lambda: cluster.router.dispatcher.num_flights == 2)
        homes = [(await task).admitted[0].decode_worker for task in (first, second)]
        assert set(homes) == {"decode-0", "decode-1"}
        for prompt, home in zip(prompts, homes, strict=True):
            again = await complete(cluster, ask([*prompt, 3, 3, 3], max_tokens=4))
            assert again.admitted[0].decode_worker == home


@pytest.mark.parametrize("policy", ["least-loaded", "power-of-two", "kv-aware", "session"])
async def test_what_is_admitted_grows_into_what_it_was_given(policy):
    """Four requests fill each pool to the last block by what they may become; none is refused."""
    settings = config(decode_blocks=16, router={"policy": policy})
    asks = [ask([5 + n] * 20, max_tokens=44, ignore_eos=True) for n in range(8)]  # 64 tokens: 4 blocks
    async with two_decodes(settings) as cluster:
        with gated_reads(cluster.decodes[0], before=True), gated_reads(cluster.decodes[1], before=True):
            tasks = [asyncio.create_task(complete(cluster, message)) for message in asks]
            books = cluster.router.dispatcher.audit
            await until(lambda: sum(p.free for p in books() if p.pool.startswith("decode:")) == 0)
            waiting = open_stream(cluster, ask("x", max_tokens=1))
            await until(lambda: cluster.router.dispatcher.planner.snapshot().length == 1)
            waiting.cancel()
        results = [await task for task in tasks]
    assert all(len(result.token_ids) == 44 for result in results)
    assert all(len(result.admitted) == 1 for result in results), "none was planned again"
