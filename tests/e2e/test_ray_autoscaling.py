"""A side grows when its memory is asked for and shrinks when it is not, without a failed request."""

from __future__ import annotations

import asyncio

import pytest
import ray
from ray import serve

from deploy.cluster.application import APP, build
from deploy.cluster.args import AppArgs
from deploy.local import LocalCluster
from tandem.client import TandemClient
from tests.e2e.ray_rig import running, settings, stream, until

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(400)]

PROMPTS = [f"part {number}, " * 12 for number in range(6)]
QUICK = {
    "min_replicas": 1,
    "max_replicas": 2,
    "upscale_delay_s": 0,
    "downscale_delay_s": 3,
    "look_back_period_s": 3,
}


async def test_decode_grows_with_the_blocks_asked_for_and_shrinks_again():
    tree = settings(decode_blocks=256)  # two of the requests fill one worker
    async with LocalCluster(tree) as embedded:
        wanted = [(await stream(embedded.address, prompt)).token_ids for prompt in PROMPTS]
    args = AppArgs(internal_port=0, decode_config={"deployment_config": {"autoscaling_config": QUICK}})
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    try:
        serve.start(proxy_location="Disabled")
        handle = await asyncio.to_thread(serve.run, build(tree, args), name=APP, route_prefix=None)
        address = (await handle.addresses.remote())["public"]
        async with TandemClient(address) as client:
            await client.wait_until_serving(60)
        assert running("DecodeServer") == 1

        is_grown = asyncio.Event()

        async def load(prompt):
            results = [await stream(address, prompt)]
            while not is_grown.is_set():
                results.append(await stream(address, prompt))
            return results

        loads = [asyncio.create_task(load(prompt)) for prompt in PROMPTS]
        await until(lambda: running("DecodeServer") == 2, 120)
        is_grown.set()
        for results, tokens in zip(await asyncio.gather(*loads), wanted, strict=True):
            assert all(result.token_ids == tokens for result in results)
        await until(lambda: running("DecodeServer") == 1, 120)
        assert (await stream(address, PROMPTS[0])).token_ids == wanted[0]
        assert running("PrefillServer") == 1
    finally:
        await asyncio.to_thread(serve.delete, APP)
        ray.shutdown()
