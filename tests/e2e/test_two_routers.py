"""Two routers over the same workers and store: each keeps its own books, and names never meet."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace

from router.registry import WorkerRole
from router.server import Router
from tandem.rpc import channel
from tests.e2e.harness import ask, complete, config, generate, quiesce, running, slow_runs, store_of, until


@asynccontextmanager
async def beside(cluster):
    """Another router that has heard of the cluster's workers; what the helpers ask of a cluster."""
    router = Router(cluster.config)
    await router.start(store_address=cluster.router.internal_address)
    for role in WorkerRole:
        for info in cluster.router.registry.ready(role):
            router.registry.register(info)
    async with channel(f"127.0.0.1:{router.port}") as own:
        yield SimpleNamespace(router=router, channel=own)
    await router.stop(drain_s=0.0)
    await router.close()


async def test_callers_of_two_routers_may_choose_the_same_name():
    settings = config(router={"worker_timeout_s": 60.0, "heartbeat_s": 10.0})
    async with running(settings) as cluster, beside(cluster) as other:
        prompts = ["a story " * 8, "another one " * 8]
        more = {"max_tokens": 30, "ignore_eos": True}
        wanted = [(await complete(cluster, ask(prompt, **more))).token_ids for prompt in prompts]
        with slow_runs(cluster.prefills[0], 0.1):  # both are on their way at once
            for _ in range(3):
                found = await asyncio.gather(
                    *(
                        generate(each, ask(prompt, request_id="mine", **more))
                        for each, prompt in zip((cluster, other), prompts, strict=True)
                    )
                )
                assert [list(answer.completions[0].token_ids) for answer in found] == wanted
                assert {answer.request_id for answer in found} == {"mine"}
        assert store_of(cluster).counters.refused_stale == 0
        await until(lambda: not any(audit.owned for audit in other.router.dispatcher.audit()))
        await quiesce(cluster)
