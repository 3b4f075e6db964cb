"""Tenants by bearer token, through either front: quotas, names of requests, and prefixes of their own."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import pytest_asyncio

from tandem.client import TandemClient
from tandem.config import SecurityConfig
from tandem.errors import NotFound, Overloaded
from tandem.sampling import SamplingParams
from tests.e2e.harness import config, gated_reads, quiesce, running, until
from tests.web import send

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIMIT = 2
FRONTS = ("grpc", "http")
PROMPT = [7 + n % 90 for n in range(40)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "tokens"
    file.write_text("a-token tenant=alice\nb-token tenant=bob\nnobodys\n")
    file.chmod(0o600)
    settings = config(
        router={"http_port": 0, "max_requests_per_tenant": LIMIT},
        cache={"prefix_bytes": 1 << 20},
        kvstore={"prefix_tokens": 16},
    )
    async with running(replace(settings, security=SecurityConfig(api_key_file=file))) as started:
        yield started


async def complete(cluster, front: str, token: str, request_id: str = "") -> tuple[str, int]:
    """(the refusal's reason or "", cached tokens) of one completion."""
    if front == "grpc":
        async with TandemClient(cluster.address, token=token) as client:
            try:
                answer = await client.generate(PROMPT, SamplingParams(max_tokens=3), request_id=request_id)
            except Overloaded as error:
                return str(error) if error.retry_after_ms else "no hint", 0
            return "", answer.completions[0].finished.usage.cached
    body = f'{{"prompt": {PROMPT}, "max_tokens": 3, "request_id": "{request_id or "r"}"}}'
    head = f"POST /v1/completions HTTP/1.1\ncontent-type: application/json\nauthorization: Bearer {token}"
    reply = await send(cluster.http_address, head, body.encode())
    if reply.status == 429:
        return reply.json()["error"]["message"] if "retry-after" in reply.headers else "no hint", 0
    assert reply.status == 200, reply.body
    assert reply.json()["id"] == (request_id or "r")
    return "", reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def running_of(cluster, tenant: str) -> int:
    flights = cluster.router.dispatcher._flights.values()
    return sum(flight.request.tenant == tenant for flight in flights)


@pytest.mark.parametrize("front", FRONTS)
async def test_a_tenant_has_its_own_limit(cluster, front):
    """Two of alice's run; a third is refused, while bob and those without a name go on."""
    with gated_reads(cluster.decodes[0], before=True):
        names = [f"{front}-{n}" for n in range(LIMIT)]
        held = [asyncio.create_task(complete(cluster, front, "a-token", name)) for name in names]
        await until(lambda: running_of(cluster, "alice") == LIMIT)
        reason, _ = await complete(cluster, front, "a-token", "one-more")
        assert reason.startswith("TENANT_QUOTA: your limit of 2 concurrent requests is reached")
        others = [asyncio.create_task(complete(cluster, front, token)) for token in ("b-token", "nobodys")]
        await until(lambda: running_of(cluster, "bob") == running_of(cluster, "") == 1)
    assert [reason for reason, _ in await asyncio.gather(*held, *others)] == [""] * 4
    await quiesce(cluster)
    assert (await complete(cluster, front, "a-token"))[0] == "", "what has ended does not count"


async def test_names_of_requests_are_each_tenants_own(cluster):
    """The same id runs twice, for alice and for bob; neither can end the other's."""
    with gated_reads(cluster.decodes[0], before=True):
        alices = asyncio.create_task(complete(cluster, "grpc", "a-token", "same"))
        bobs = asyncio.create_task(complete(cluster, "http", "b-token", "same"))
        await until(lambda: running_of(cluster, "alice") == running_of(cluster, "bob") == 1)
        async with TandemClient(cluster.address, token="nobodys") as client:
            for name in ("same", "alice/same", "same#0"):
                with pytest.raises(NotFound):
                    await client.cancel(name)
        async with TandemClient(cluster.address, token="b-token") as client:
            await client.cancel("same")
        with pytest.raises(AssertionError):  # 499: it was cancelled
            await bobs
    assert (await alices)[0] == ""


async def test_a_prefix_is_warm_for_the_tenant_that_left_it(cluster):
    """By either front, and cold for everybody else (kvstore/chain.py salts names by tenant)."""
    fresh = [3 + n % 50 for n in range(40)]
    async with TandemClient(cluster.address, token="a-token") as alice:
        first = await alice.generate(fresh, SamplingParams(max_tokens=2))
        await quiesce(cluster)
        again = await alice.generate(fresh, SamplingParams(max_tokens=2))
    async with TandemClient(cluster.address, token="b-token") as bob:
        theirs = await bob.generate(fresh, SamplingParams(max_tokens=2))
    cached = [answer.completions[0].finished.usage.cached for answer in (first, again, theirs)]
    assert cached == [0, 32, 0]
    tokens = [list(answer.completions[0].token_ids) for answer in (first, again, theirs)]
    assert tokens[0] == tokens[1] == tokens[2]
