"""Replicas of a service on Ray die, leave and come back; no token is lost, doubled or changed."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
import pytest_asyncio

from deploy.cluster.service import RayService
from deploy.local import LocalCluster
from tests.e2e.ray_rig import free_port, kill, replicas, running, settings, stream, until

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(300)]

PROMPTS = [f"story {number}, " * 12 for number in range(6)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service():
    """Two replicas of each kind; tests put back what they break."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "local")
        async with RayService(settings(port=free_port()), 2, 2) as started:
            yield started


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def wanted():
    """The tokens of an undisturbed run without Ray, by prompt."""
    async with LocalCluster(settings()) as embedded:
        found = [await stream(embedded.address, prompt) for prompt in PROMPTS]
    return {prompt: result.token_ids for prompt, result in zip(PROMPTS, found, strict=True)}


def decoder_of(result) -> str:
    """The replica that decodes a stream."""
    return result.admitted[-1].decode_worker.removeprefix("decode-")


def prefiller_of(result) -> str:
    """The replica that computed a stream's prompt."""
    return result.admitted[-1].prefill_worker.removeprefix("prefill-")


def replica_pids() -> list[int]:
    return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if is_replica(path)]


def is_replica(cmdline: Path) -> bool:
    try:
        return "ServeReplica:tandem" in cmdline.read_text()
    except OSError:  # it has ended meanwhile
        return False


async def both_are_up(deployment, without):
    """Serve says so of a replica that has died until it looks after it again."""

    def are_up() -> bool:
        found = replicas(deployment)
        return running(deployment) == len(found) == 2 and without not in found

    await until(are_up)


@pytest.mark.asyncio(loop_scope="module")
async def test_replicas_run_at_the_priority_of_who_starts_them(service):
    """Ray would make them nicer by 15, and any neighbour would take their time."""
    pids = replica_pids()
    assert len(pids) >= 5
    assert {os.getpriority(os.PRIO_PROCESS, pid) for pid in pids} == {os.getpriority(os.PRIO_PROCESS, 0)}


@pytest.mark.asyncio(loop_scope="module")
async def test_a_decode_replica_that_is_killed_loses_no_token(service, wanted):
    killed = []

    def act(result):
        killed.append(decoder_of(result))
        kill("DecodeServer", killed[0])

    prompt = PROMPTS[0]
    result = await stream(service.address, prompt, 200, act)
    assert result.token_ids == wanted[prompt]
    assert len(result.admitted) == 2
    assert decoder_of(result) != killed[0]
    await both_are_up("DecodeServer", without=killed[0])


@pytest.mark.asyncio(loop_scope="module")
async def test_a_prefill_replica_that_is_killed_fails_no_request(service, wanted):
    """The router still counts on it when the next requests come, as it was idle when it died."""
    first = await stream(service.address, PROMPTS[1])
    killed = prefiller_of(first)
    others = [asyncio.create_task(stream(service.address, prompt)) for prompt in PROMPTS[:3]]
    await asyncio.to_thread(kill, "PrefillServer", killed)
    results = await asyncio.gather(*others, *(stream(service.address, prompt) for prompt in PROMPTS[3:]))
    assert [r.token_ids for r in results] == [wanted[prompt] for prompt in PROMPTS]
    assert all(prefiller_of(r) != killed for r in results[3:])
    await both_are_up("PrefillServer", without=killed)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_router_that_is_killed_comes_back_with_the_same_workers(service, wanted):
    (router,), workers = replicas("Router"), replicas("DecodeServer") | replicas("PrefillServer")
    result = await stream(service.address, PROMPTS[0], 100, lambda result: kill("Router", router))
    assert result.token_ids == wanted[PROMPTS[0]], "the client took its stream up again"
    assert replicas("DecodeServer") | replicas("PrefillServer") == workers
    assert router not in replicas("Router")
