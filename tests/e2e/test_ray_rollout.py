"""What `serve deploy` does: a side shrinks, is replaced or grows while streams run, and none notices."""

from __future__ import annotations

import asyncio

import pytest
import pytest_asyncio
import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from deploy.cluster.application import APP
from deploy.cluster.args import AppArgs
from deploy.cluster.manifest import serve_config
from deploy.local import LocalCluster
from tandem.client import TandemClient
from tests.e2e.ray_rig import (
    free_port,
    long_llama,
    replicas,
    running,
    settings,
    sides_of,
    stream,
    until,
)

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(300)]

PROMPTS = [f"chapter {number}, " * 12 for number in range(4)]
CPUS = 0.2


class Deployed:
    """An application that is there because a Serve config says so."""

    def __init__(self) -> None:
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        self._args = AppArgs(
            model=str(long_llama()),
            draft="none",
            engine_kwargs=sides_of(settings()),
            prefill=2,
            decode=2,
            port=port,
            internal_port=port + 1,
            http_port=None,
        )

    def apply(self, **decode_server: object) -> None:
        """Make it so, with these options of DecodeServer; the others stay as they are."""
        document = serve_config(self._args)
        if decode_server:
            document["applications"][0]["deployments"] = [{"name": "DecodeServer", **decode_server}]
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(document))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def deployed():
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    serve.start(proxy_location="Disabled")
    service = Deployed()
    try:
        service.apply()
        async with TandemClient(service.address) as client:
            await client.wait_until_serving(120)
        await until(lambda: running("DecodeServer") == running("PrefillServer") == 2)
        yield service
    finally:
        await asyncio.to_thread(serve.delete, APP)
        ray.shutdown()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def wanted():
    """The tokens of an undisturbed run without Ray, by prompt."""
    async with LocalCluster(settings()) as embedded:
        found = [await stream(embedded.address, prompt) for prompt in PROMPTS]
    return {prompt: result.token_ids for prompt, result in zip(PROMPTS, found, strict=True)}


async def started(address):
    """Streams that run, two on each decode replica."""
    going = asyncio.Queue()
    streams = [
        asyncio.create_task(stream(address, prompt, 20, lambda result: going.put_nowait(result)))
        for prompt in PROMPTS
    ]
    for _ in streams:
        await asyncio.wait_for(going.get(), 60)
    return streams


@pytest.mark.asyncio(loop_scope="module")
async def test_a_replica_that_is_taken_away_first_finishes_what_it_runs(deployed, wanted):
    streams = await started(deployed.address)
    deployed.apply(num_replicas=1)
    results = await asyncio.gather(*streams)

    assert [r.token_ids for r in results] == [wanted[prompt] for prompt in PROMPTS]
    assert len({r.admitted[0].decode_worker for r in results}) == 2, "both replicas had work"
    assert {len(r.admitted) for r in results} == {1}, "and none of it moved"
    await until(lambda: len(replicas("DecodeServer")) == 1)
    deployed.apply(num_replicas=2)
    await until(lambda: running("DecodeServer") == 2)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_side_is_replaced_under_load_without_an_error(deployed, wanted):
    before, prefills = replicas("DecodeServer"), replicas("PrefillServer")
    is_over = asyncio.Event()

    async def load(prompt):
        results = []
        while not is_over.is_set():
            results.append(await stream(deployed.address, prompt))
        return results

    loads = [asyncio.create_task(load(prompt)) for prompt in PROMPTS[:2]]
    deployed.apply(ray_actor_options={"num_cpus": CPUS / 2})
    await until(lambda: running("DecodeServer") == 2 and not before & replicas("DecodeServer"), 200)
    is_over.set()
    for prompt, results in zip(PROMPTS, await asyncio.gather(*loads), strict=False):
        assert results
        assert all(r.token_ids == wanted[prompt] for r in results)
    assert replicas("PrefillServer") == prefills, "the other side was left alone"
