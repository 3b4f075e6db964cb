"""Between the processes of a service: mutual TLS, a token besides, and no plaintext beyond loopback."""

from __future__ import annotations

from dataclasses import replace

import grpc
import pytest

from deploy.cluster.args import AppArgs
from deploy.commands import audit
from deploy.embedded import EmbeddedService
from router.server import Router
from tandem.audit import fetch_audit
from tandem.client import TandemClient
from tandem.config import ClusterConfig, InternalConfig, SecurityConfig
from tandem.errors import ConfigError
from tandem.internal import NAME, InternalPlane
from tandem.rpc import channel
from tests.certificates import self_signed
from tests.e2e.harness import MIB, ask, complete, config, running
from tests.e2e.test_prefixes import PIECE, conversation, say

ELSEWHERE = "192.0.2.1"  # an address of nobody (RFC 5737)


@pytest.fixture
def guarded(tmp_path):
    def of(settings: ClusterConfig, token: str = "correct-horse", name: str = "internal") -> ClusterConfig:
        pair = self_signed(name, f"DNS:{NAME}")
        file = tmp_path / f"token-{token}"
        file.write_text(f"{token}\n")
        file.chmod(0o600)
        internal = InternalConfig(
            tls_cert=pair.cert, tls_key=pair.key, tls_ca=pair.cert, token_file=file if token else None
        )
        return replace(settings, internal=internal)

    return of


async def test_the_service_works_and_nobody_else_gets_in(guarded, caplog):
    """Hand-offs, prefixes, the audit and what replicas are asked; then five who are not of the service."""
    settings = guarded(config(cache={"prefix_bytes": 4 * MIB}, kvstore={"prefix_tokens": PIECE}))
    prompts = conversation(2)
    async with running(config()) as plain:
        wanted = (await say(plain, prompts))[0]
    async with running(settings, num_decode=2) as cluster:
        tokens, cached = await say(cluster, prompts)
        assert tokens == wanted
        assert cached[1] > 0
        address, worker = cluster.router.internal_address, cluster.decodes[0].address
        found = await audit.collect(address, 10, InternalPlane.of(settings))
        assert len([pool for process, pool in found.pools if process == "worker"]) == 3
        foreign, stale = guarded(settings, name="foreign"), guarded(settings, token="wrong")
        others = {
            "plaintext": InternalPlane(),
            "another authority": InternalPlane.of(foreign),
            "no token": InternalPlane.of(guarded(settings, token="")),
            "another token": InternalPlane.of(stale),
        }
        for who, plane in others.items():
            for place in (address, worker):
                async with plane.channel(place) as outside:
                    with pytest.raises(grpc.aio.AioRpcError) as refused:
                        await fetch_audit(outside, 2.0)
                codes = {"no token": "UNAUTHENTICATED", "another token": "UNAUTHENTICATED"}
                assert refused.value.code().name == codes.get(who, "UNAVAILABLE"), who
        assert (await complete(cluster, ask("still there"))).finished is not None


async def test_a_process_tree_with_certificates(guarded):
    settings = guarded(config())
    async with EmbeddedService(settings) as service:
        async with TandemClient(service.address) as client:
            assert len((await client.generate("a story")).completions) == 1
        async with channel(service.internal_address) as plain:
            with pytest.raises(grpc.aio.AioRpcError):
                await fetch_audit(plain, 2.0)


def test_plaintext_stays_on_this_machine(guarded):
    plain = config()
    with pytest.raises(ConfigError, match=r"internal\.tls_cert"):
        Router(plain, ELSEWHERE)
    with pytest.raises(ConfigError, match="insecure"):
        InternalPlane.of(plain).bind(None, ELSEWHERE, 0)
    for allowed in (replace(plain, security=SecurityConfig(insecure=True)), guarded(plain)):
        InternalPlane.of(allowed).check_exposure(ELSEWHERE)


def test_ray_across_machines_needs_either(guarded):
    args = AppArgs(network="node")
    with pytest.raises(ConfigError, match=r"internal\.tls_cert"):
        args.check(config())
    args.check(guarded(config()))
    args.check(replace(config(), security=SecurityConfig(insecure=True)))


@pytest.mark.parametrize(
    ("values", "message"),
    [({"tls_cert": "a"}, "together"), ({"token_file": "a"}, "no secret")],
)
def test_half_of_it_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        ClusterConfig.from_dict({"internal": values})


def test_a_file_that_is_not_there_is_named(guarded, tmp_path):
    settings = guarded(config())
    broken = replace(settings, internal=replace(settings.internal, tls_ca=tmp_path / "nowhere.pem"))
    with pytest.raises(ConfigError, match=r"nowhere\.pem"):
        InternalPlane.of(broken)
