"""Tokens, TLS, and the addresses that need them; over real connections where there is one."""

from __future__ import annotations

from contextlib import asynccontextmanager

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from tandem import rpc
from tandem.client import TandemClient
from tandem.config import SecurityConfig
from tandem.errors import ConfigError, Unauthenticated, Unavailable
from tandem.pb.v1 import model_pb2, model_pb2_grpc
from tandem.security import (
    ApiKey,
    BearerTokens,
    check_exposure,
    client_credentials,
    server_credentials,
    tokens_of,
)
from tests.certificates import self_signed

TOKENS = BearerTokens([ApiKey("correct horse", "stable"), ApiKey("tökén")])


def private(path, text):
    path.write_text(text)
    path.chmod(0o600)
    return path


# --- tokens ---


@pytest.mark.parametrize(
    "header", [b"Bearer correct horse", b"bearer correct horse", "Bearer tökén".encode()]
)
def test_an_accepted_token_passes(header):
    TOKENS.check(header)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (None, "NO_TOKEN"),
        (b"", "NO_TOKEN"),
        (b"Bearer", "BAD_TOKEN"),
        (b"Bearer ", "BAD_TOKEN"),
        (b"Bearer correct hors", "BAD_TOKEN"),
        (b"Bearer correct horse2", "BAD_TOKEN"),
        (b"Basic correct horse", "BAD_TOKEN"),
        (b"correct horse", "BAD_TOKEN"),
        (b"Bearer t\xf6k\xe9n", "BAD_TOKEN"),
        (b"Bearer \xff\xfe\x00", "BAD_TOKEN"),
    ],
)
def test_everything_else_is_refused(header, reason):
    with pytest.raises(Unauthenticated) as refused:
        TOKENS.check(header)
    assert refused.value.reason == reason


def test_tokens_are_the_lines_of_a_file(tmp_path):
    file = private(tmp_path / "keys", "# ours\n one \n\r\ntwo\r\n")
    tokens = tokens_of(SecurityConfig(api_key_file=file))
    tokens.check(b"Bearer one")
    tokens.check(b"Bearer two")
    assert TOKENS.check(b"Bearer correct horse") == "stable"
    assert TOKENS.check("Bearer tökén".encode()) == ""
    with pytest.raises(Unauthenticated):
        tokens.check(b"Bearer # ours")


def test_a_line_may_say_whose_token_it_is(tmp_path):
    file = private(tmp_path / "keys", "one tenant=alice\ntwo tenant=bob\nthree\nfour tenant=alice\n")
    tokens = tokens_of(SecurityConfig(api_key_file=file))
    whose = {name: tokens.check(f"Bearer {name}".encode()) for name in ("one", "two", "three", "four")}
    assert whose == {"one": "alice", "two": "bob", "three": "", "four": "alice"}
    with pytest.raises(Unauthenticated):
        tokens.check(b"Bearer one tenant=alice")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("one tenant=a/b\n", "must be TOKEN or TOKEN tenant=NAME"),
        ("one tenant=\n", "holds a line|must be TOKEN"),
        ("one tenant=a\none tenant=b\n", "gives one token to two tenants"),
        ("one\none tenant=b\n", "gives one token to two tenants"),
    ],
)
def test_a_line_that_is_not_clear_is_refused(tmp_path, text, says):
    with pytest.raises(ConfigError, match=says):
        BearerTokens.from_file(private(tmp_path / "keys", text))


@pytest.mark.parametrize("text", ["", "\n\n", "# none\n"])
def test_a_file_without_tokens_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match=r"holds no token|is empty"):
        BearerTokens.from_file(private(tmp_path / "keys", text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*keys"):
        BearerTokens.from_file(tmp_path / "keys")


def test_a_file_that_everybody_can_read_is_no_secret(tmp_path):
    file = private(tmp_path / "keys", "one\n")
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod"):
        BearerTokens.from_file(file)


# --- addresses ---


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_needs_nothing(host):
    check_exposure(host, SecurityConfig())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org", ""])
def test_other_addresses_need_tokens_and_tls_or_a_plain_word(tmp_path, host):
    pair = {"tls_cert": tmp_path / "c", "tls_key": tmp_path / "k"}
    for lacking in (SecurityConfig(), SecurityConfig(api_key_file=tmp_path / "t"), SecurityConfig(**pair)):
        with pytest.raises(ConfigError, match="refusing to listen on"):
            check_exposure(host, lacking)
    check_exposure(host, SecurityConfig(api_key_file=tmp_path / "t", **pair))
    check_exposure(host, SecurityConfig(insecure=True))


def test_half_a_pair_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="needs its key"):
        SecurityConfig(tls_cert=tmp_path / "c")
    with pytest.raises(ConfigError, match="client CA needs"):
        SecurityConfig(tls_client_ca=tmp_path / "ca")


def test_files_that_are_no_pair_are_named(tmp_path):
    ours, other = self_signed(), self_signed("other")
    for cert, key in ((ours.cert, other.key), (ours.key, ours.key), (private(tmp_path / "x", "x"), ours.key)):
        with pytest.raises(ConfigError, match="not a certificate and its key"):
            server_credentials(SecurityConfig(tls_cert=cert, tls_key=key))


# --- over gRPC ---


class Models(model_pb2_grpc.ModelServiceServicer):
    """Answers whoever gets through."""

    async def ListModels(self, request, context):
        return model_pb2.ListModelsResponse(models=[model_pb2.Model(name="m")])


class EveryKind:
    """Methods of each kind that must never run."""

    num_calls = 0

    async def unary_unary(self, request, context):
        self.num_calls += 1
        return request

    stream_unary = unary_unary

    async def unary_stream(self, request, context):
        self.num_calls += 1
        yield request

    stream_stream = unary_stream


@asynccontextmanager
async def serving(*, tokens=None, security=None, also=None):
    server = rpc.server(public=True, tokens=tokens)
    model_pb2_grpc.add_ModelServiceServicer_to_server(Models(), server)
    health_pb2_grpc.add_HealthServicer_to_server(health_aio.HealthServicer(), server)
    if also is not None:
        server.add_generic_rpc_handlers((also,))
    port = rpc.bind(server, "127.0.0.1", 0, server_credentials(security or SecurityConfig()))
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


async def models(address, **options):
    async with TandemClient(address, **options) as client:
        return [model.name for model in await client.models()]


async def test_a_call_needs_a_token_but_health_does_not():
    async with serving(tokens=TOKENS) as address:
        assert await models(address, token="correct horse") == ["m"]
        for token, reason in ((None, "NO_TOKEN"), ("wrong", "BAD_TOKEN")):
            with pytest.raises(Unauthenticated) as refused:
                await models(address, token=token)
            assert refused.value.reason == reason
            assert refused.value.error_id
        async with TandemClient(address) as client:
            await client.wait_until_serving(5)


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream", "stream_unary", "stream_stream"])
async def test_every_kind_of_method_is_refused_before_it_runs(kind):
    servicer = EveryKind()
    method = getattr(grpc, f"{kind}_rpc_method_handler")(
        getattr(servicer, kind), StringValue.FromString, StringValue.SerializeToString
    )
    also = grpc.method_handlers_generic_handler("test.Every", {"Kind": method})
    async with serving(tokens=TOKENS, also=also) as address, rpc.channel(address) as channel:
        call = getattr(channel, kind)("/test.Every/Kind")
        answer = call(iter([b""]) if kind.startswith("stream") else b"")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            [_ async for _ in answer] if kind.endswith("stream") else await answer
    assert rpc.to_tandem_error(refused.value).reason == "NO_TOKEN"
    assert servicer.num_calls == 0


async def test_tls_serves_those_who_know_the_certificate_and_nobody_in_plaintext():
    ours = self_signed()
    async with serving(security=SecurityConfig(tls_cert=ours.cert, tls_key=ours.key)) as address:
        assert await models(address, credentials=client_credentials(ours.cert)) == ["m"]
        for wrong in (None, client_credentials(self_signed("other").cert)):
            with pytest.raises(Unavailable):
                await models(address, credentials=wrong)


async def test_mutual_tls_serves_clients_with_a_certificate_of_the_authority():
    ours, client, stranger = self_signed(), self_signed("client"), self_signed("stranger")
    security = SecurityConfig(tls_cert=ours.cert, tls_key=ours.key, tls_client_ca=client.cert)
    async with serving(security=security) as address:
        known = client_credentials(ours.cert, client.cert, client.key)
        assert await models(address, credentials=known) == ["m"]
        for wrong in (
            client_credentials(ours.cert),
            client_credentials(ours.cert, stranger.cert, stranger.key),
        ):
            with pytest.raises(Unavailable):
                await models(address, credentials=wrong)
