"""A cluster of three nodes, simulated by three raylets on this machine: placement, and a node's death."""

from __future__ import annotations

import asyncio

import pytest
import pytest_asyncio
import ray
from ray import serve
from ray.cluster_utils import Cluster

from deploy.cluster.application import APP, build
from deploy.cluster.args import AppArgs
from deploy.local import LocalCluster
from tandem.client import TandemClient
from tandem.config import SecurityConfig
from tests.e2e.ray_rig import end_machine, nodes_of, settings, stream, until

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(400)]

PROMPTS = [f"verse {number}, " * 12 for number in range(4)]
ONE_PER_NODE = {
    "max_replicas_per_node": 1,
    "ray_actor_options": {"num_cpus": 0.2, "resources": {"worker": 0.01}},
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def nodes():
    """A head without workers, and two nodes with one worker of each kind."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    workers = [cluster.add_node(num_cpus=1, resources={"worker": 1}) for _ in range(2)]
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster, workers
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.asyncio(loop_scope="module")
async def test_a_node_that_dies_mid_stream_loses_no_request(nodes):
    cluster, workers = nodes
    tree = settings(host="127.0.0.1")
    async with LocalCluster(tree) as embedded:
        wanted = [(await stream(embedded.address, prompt)).token_ids for prompt in PROMPTS]
    tree = settings(security=SecurityConfig(insecure=True))
    args = AppArgs(
        prefill=2,
        decode=2,
        network="node",
        internal_port=0,
        prefill_config={"deployment_config": ONE_PER_NODE},
        decode_config={"deployment_config": ONE_PER_NODE},
    )
    serve.start(proxy_location="Disabled")
    handle = await asyncio.to_thread(serve.run, build(tree, args), name=APP, route_prefix=None)
    addresses = await handle.addresses.remote()
    async with TandemClient(addresses["internal"]) as client:
        await client.wait_until_serving(60)

    places = {
        kind: await asyncio.to_thread(nodes_of, kind) for kind in ("Router", "PrefillServer", "DecodeServer")
    }
    assert places["PrefillServer"] == places["DecodeServer"] == {node.node_id for node in workers}
    assert places["Router"] == {cluster.head_node.node_id}

    going = asyncio.Queue()
    streams = [
        asyncio.create_task(stream(addresses["public"], prompt, 100, going.put_nowait)) for prompt in PROMPTS
    ]
    for _ in streams:
        await asyncio.wait_for(going.get(), 60)
    await asyncio.to_thread(end_machine, cluster, workers[0])
    results = await asyncio.gather(*streams)
    assert [r.token_ids for r in results] == wanted
    (survivor,) = {r.admitted[-1].decode_worker for r in results}
    first = {r.admitted[0].decode_worker for r in results}
    assert len(first) == 2, "both nodes decoded"
    for result in results:
        stayed = result.admitted[0].decode_worker == survivor
        assert (len(result.admitted) == 1) == stayed, "those of the other node went on as they were"
    await until(lambda: nodes_of("DecodeServer") == {workers[1].node_id})
    again = await stream(addresses["public"], PROMPTS[0])
    assert again.token_ids == wanted[0]
