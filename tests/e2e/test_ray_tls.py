"""On Ray with everything guarded: tokens and mutual TLS for clients, and others between the processes."""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass, replace
from typing import Any

import grpc
import pytest
import pytest_asyncio
import ray
from ray import serve

from deploy.cluster.application import APP, build
from deploy.cluster.args import AppArgs
from deploy.local import LocalCluster
from tandem.audit import fetch_audit
from tandem.client import TandemClient
from tandem.config import ClusterConfig, InternalConfig, SecurityConfig
from tandem.errors import Unauthenticated, Unavailable
from tandem.internal import NAME, InternalPlane
from tandem.security import client_credentials
from tests.certificates import Certificate, self_signed
from tests.e2e.ray_rig import kill, replicas, settings, stream, until
from tests.web import post

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.timeout(300),
    pytest.mark.asyncio(loop_scope="module"),
]

TOKEN = "correct-horse"
PROMPT = "verse, " * 12


@dataclass(frozen=True)
class Guarded:
    """A running service, and what its clients show."""

    addresses: dict[str, str]
    tree: ClusterConfig
    server: Certificate
    client: Certificate

    @property
    def credentials(self) -> grpc.ChannelCredentials:
        return client_credentials(self.server.cert, self.client.cert, self.client.key)

    @property
    def access(self) -> dict[str, Any]:
        return {"token": TOKEN, "credentials": self.credentials}


def secret(folder, name: str, text: str):
    file = folder / name
    file.write_text(text)
    file.chmod(0o600)
    return file


def guard(tree: ClusterConfig, folder) -> ClusterConfig:
    server, client, inside = self_signed(), self_signed("client"), self_signed("internal", f"DNS:{NAME}")
    return replace(
        tree,
        security=SecurityConfig(
            api_key_file=secret(folder, "keys", TOKEN),
            tls_cert=server.cert,
            tls_key=server.key,
            tls_client_ca=client.cert,
        ),
        internal=InternalConfig(
            tls_cert=inside.cert,
            tls_key=inside.key,
            tls_ca=inside.cert,
            token_file=secret(folder, "internal", "another-horse"),
        ),
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory):
    """One prefill and two decode replicas, which reach each other by the node's own address."""
    tree = guard(settings(http_port=0), tmp_path_factory.mktemp("keys"))
    args = AppArgs(prefill=1, decode=2, network="node", internal_port=0)
    ray.init("local", include_dashboard=False, log_to_driver=False)
    try:
        serve.start(proxy_location="Disabled")
        handle = await asyncio.to_thread(serve.run, build(tree, args), name=APP, route_prefix=None)
        addresses = await handle.addresses.remote()
        async with InternalPlane.of(tree).client(addresses["internal"]) as client:
            await client.wait_until_serving(60)
        yield Guarded(addresses, tree, self_signed(), self_signed("client"))
    finally:
        await asyncio.to_thread(ray.shutdown)


async def test_tokens_are_those_of_the_embedded_mode_and_survive_a_killed_worker(service):
    async with LocalCluster(settings()) as embedded:
        wanted = await stream(embedded.address, PROMPT)
    killed = []

    def act(result):
        killed.append(result.admitted[-1].decode_worker.removeprefix("decode-"))
        kill("DecodeServer", killed[0])

    result = await stream(service.addresses["public"], PROMPT, 200, act, **service.access)
    assert (result.token_ids, len(result.admitted)) == (wanted.token_ids, 2)
    await until(lambda: len(replicas("DecodeServer") - set(killed)) == 2)


async def test_the_openai_api_is_served_over_tls(service):
    trusting = ssl.create_default_context(cafile=service.server.cert)
    trusting.load_cert_chain(service.client.cert, service.client.key)
    body = {"model": "", "prompt": "x", "max_tokens": 3}
    reply = await post(service.addresses["http"], "/v1/completions", body, TOKEN, tls=trusting)
    assert (reply.status, reply.json()["usage"]["completion_tokens"]) == (200, 3)
    reply = await post(service.addresses["http"], "/v1/completions", body, "wrong", tls=trusting)
    assert (reply.status, reply.code) == (401, "BAD_TOKEN")


async def test_nobody_else_is_served(service):
    public, internal = service.addresses["public"], service.addresses["internal"]
    assert not internal.startswith("127."), "the processes reach each other beyond loopback"
    strangers = {
        "a wrong token": ({"token": "wrong", "credentials": service.credentials}, Unauthenticated),
        "no token": ({"credentials": service.credentials}, Unauthenticated),
        "no certificate": (
            {"token": TOKEN, "credentials": client_credentials(service.server.cert)},
            Unavailable,
        ),
        "plaintext": ({"token": TOKEN}, Unavailable),
    }
    for shown, error in strangers.values():
        async with TandemClient(public, **shown) as client:
            with pytest.raises(error):
                await client.models()
    foreign = self_signed("foreign", f"DNS:{NAME}")
    other = InternalConfig(tls_cert=foreign.cert, tls_key=foreign.key, tls_ca=foreign.cert)
    for plane in (InternalPlane(), InternalPlane.of(replace(service.tree, internal=other))):
        async with plane.channel(internal) as outside:
            with pytest.raises(grpc.aio.AioRpcError):
                await fetch_audit(outside, 2.0)
