"""A service on a real Ray cluster, and the means to look at its replicas and to kill them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import signal
import socket
import tempfile
from dataclasses import replace
from pathlib import Path

import ray
from ray import serve
from ray._private.node import Node
from ray._private.ray_constants import PROCESS_TYPE_RAYLET
from ray.cluster_utils import Cluster

from deploy.cluster.application import APP
from tandem.client import TandemClient
from tandem.config import ClusterConfig, SecurityConfig
from tandem.sampling import SamplingParams
from tests.checkpoints import save_llama
from tests.e2e.harness import Result, config

LONG_TOKENS = 1500  # seconds of decoding: time to break things
LONG = SamplingParams(max_tokens=LONG_TOKENS, ignore_eos=True, temperature=1.0, seed=4)
PATIENCE_S = 60.0


@functools.cache
def long_llama() -> Path:
    """The tiny checkpoint with room for long answers, made once per run."""
    return save_llama(Path(tempfile.mkdtemp(prefix="tandem-test-")) / "long-llama", max_context=2048)


def settings(
    security: SecurityConfig | None = None, decode_blocks: int = 2048, **router: object
) -> ClusterConfig:
    built = config(
        prefill_blocks=512,
        decode_blocks=decode_blocks,
        store_blocks=2048,
        model={"path": long_llama()},
        router={"default_timeout_s": PATIENCE_S, **router},
    )
    return replace(built, security=security or SecurityConfig())


def free_port() -> int:
    """One that is free, and so is the next: the router's two."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = int(one.getsockname()[1])
            try:
                other.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


async def stream(
    address: str, prompt: str = "a story", after_tokens: int = 0, do=None, **access: object
) -> Result:
    """One long stream; `do(result)` is called once when so many tokens have come."""
    result = Result()
    async with TandemClient(address, **access) as client:
        async for event in client.stream(prompt, LONG, timeout_s=PATIENCE_S):
            result.take(event)
            if do is not None and len(result.token_ids) >= after_tokens:
                do, act = None, do
                await asyncio.to_thread(act, result)
    return result


def replicas(deployment: str) -> set[str]:
    """Ids of the replicas that have an actor."""
    prefix = f"SERVE_REPLICA::{APP}#{deployment}#"
    actors = ray.util.list_named_actors(all_namespaces=True)
    return {a["name"].removeprefix(prefix) for a in actors if a["name"].startswith(prefix)}


def kill(deployment: str, replica: str) -> None:
    """End a replica's process at once; nothing of it runs any more code."""
    name = f"SERVE_REPLICA::{APP}#{deployment}#{replica}"
    ray.kill(ray.get_actor(name, namespace="serve"))


def end_machine(cluster: Cluster, node: Node) -> None:
    """End a node and, as a machine's death would, all that it runs; replicas outlive a raylet by seconds."""
    (raylet,) = node.all_processes[PROCESS_TYPE_RAYLET]
    orphans = children_of(raylet.process.pid)
    cluster.remove_node(node, allow_graceful=False)
    for pid in orphans:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def children_of(parent: int) -> list[int]:
    """Ids of the processes that a process has started itself."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # one that has ended meanwhile
            fields = path.read_text().rpartition(")")[2].split()
            found += [int(path.parent.name)] * (int(fields[1]) == parent)
    return found


def running(deployment: str) -> int:
    """How many replicas Serve says are up."""
    application = serve.status().applications[APP]
    return application.deployments[deployment].replica_states.get("RUNNING", 0)


async def until(condition, within_s: float = PATIENCE_S) -> None:
    """Wait for what happens in another process."""
    async with asyncio.timeout(within_s):
        while not await asyncio.to_thread(condition):  # noqa: ASYNC110 (nobody tells a test)
            await asyncio.sleep(0.1)


def sides_of(built: ClusterConfig) -> dict[str, dict[str, object]]:
    """Pools and time limits as `engine_kwargs`; what to serve and where is said by other arguments."""
    values = json.loads(built.to_json())
    router = {"default_timeout_s": values["router"]["default_timeout_s"]}
    return {"cache": values["cache"], "kvstore": values["kvstore"], "router": router}


def nodes_of(deployment: str) -> set[str]:
    """Ids of the nodes on which a deployment's replicas are alive."""
    details = serve.context._get_global_client().get_serve_details()
    found = details["applications"][APP]["deployments"][deployment]["replicas"]
    return {replica["node_id"] for replica in found if replica["state"] == "RUNNING"}
