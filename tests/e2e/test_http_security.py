"""Who may call the HTTP listener: tokens for both fronts, TLS, certificates, and addresses that need them."""

from __future__ import annotations

import asyncio
import ssl
import sys
from contextlib import asynccontextmanager
from dataclasses import replace

import openai
import pytest
import pytest_asyncio
from starlette.responses import PlainTextResponse

from router.http.server import HttpServer
from tandem.client import TandemClient
from tandem.config import SecurityConfig
from tandem.errors import ConfigError, Unauthenticated
from tests.certificates import self_signed
from tests.e2e.harness import config, running
from tests.web import get, post

TOKEN = "correct-horse"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "tokens"
    file.write_text(f"# ours\nother\n{TOKEN}\n")
    file.chmod(0o600)
    settings = replace(config(router={"http_port": 0}), security=SecurityConfig(api_key_file=file))
    async with running(settings) as started:
        yield started


@pytest.mark.asyncio(loop_scope="module")
async def test_one_file_of_tokens_guards_both_fronts(cluster):
    base_url = f"http://{cluster.http_address}/v1"
    async with openai.AsyncOpenAI(base_url=base_url, api_key=TOKEN, max_retries=0) as client:
        assert (await client.completions.create(model="", prompt="x", max_tokens=1)).usage.total_tokens == 2
    async with TandemClient(cluster.address, token=TOKEN) as client:
        assert len(await client.models()) == 1

    async with openai.AsyncOpenAI(base_url=base_url, api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as refused:
            await client.completions.create(model="", prompt="x")
    assert (refused.value.code, refused.value.type) == ("BAD_TOKEN", "authentication_error")
    assert "wrong" not in str(refused.value)
    async with TandemClient(cluster.address, token="wrong") as client:
        with pytest.raises(Unauthenticated):
            await client.models()


@pytest.mark.asyncio(loop_scope="module")
async def test_without_a_token_there_is_nothing_but_health(cluster):
    for path in ("/v1/models", "/version", "/metrics", "/nowhere"):
        reply = await get(cluster.http_address, path)
        assert (reply.status, reply.code) == (401, "NO_TOKEN")
        assert reply.headers["www-authenticate"] == "bearer"
    unread = await post(cluster.http_address, "/v1/completions", b"no json at all")
    assert unread.status == 401
    for path in ("/health", "/health/live"):
        assert (await get(cluster.http_address, path)).status == 200
    assert (await get(cluster.http_address, "/metrics", TOKEN)).status == 200


# --- the listener by itself ---


@asynccontextmanager
async def listening(security):
    server = HttpServer("127.0.0.1", 0, security)
    await server.start(PlainTextResponse("hello"))
    yield f"127.0.0.1:{server.port}"
    await server.stop()


def trusting(certificate, own=None):
    """What a client brings: whom it trusts, and what it shows."""
    context = ssl.create_default_context(cafile=certificate.cert)
    if own:
        context.load_cert_chain(own.cert, own.key)
    return context


async def test_tls_serves_those_who_know_the_certificate_and_nobody_in_plaintext():
    ours = self_signed()
    async with listening(SecurityConfig(tls_cert=ours.cert, tls_key=ours.key)) as address:
        assert (await get(address, "/", tls=trusting(ours))).body == b"hello"
        with pytest.raises(ssl.SSLCertVerificationError):
            await get(address, "/", tls=trusting(self_signed("other")))
        with pytest.raises(ConnectionError):
            await get(address, "/")


async def test_mutual_tls_serves_clients_with_a_certificate_of_the_authority():
    ours, client, stranger = self_signed(), self_signed("client"), self_signed("stranger")
    security = SecurityConfig(tls_cert=ours.cert, tls_key=ours.key, tls_client_ca=client.cert)
    async with listening(security) as address:
        assert (await get(address, "/", tls=trusting(ours, client))).body == b"hello"
        for wrong in (None, stranger):
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await get(address, "/", tls=trusting(ours, wrong))


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_an_address_that_others_reach_needs_tokens_and_tls(host):
    with pytest.raises(ConfigError, match="--insecure"):
        HttpServer(host, 0, SecurityConfig())


async def test_a_port_in_use_is_said():
    async with listening(SecurityConfig()) as address:
        port = int(address.rpartition(":")[2])
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}.*in use"):
            HttpServer("127.0.0.1", port, SecurityConfig())


def test_a_client_ca_that_is_none_is_named(tmp_path):
    ours, wrong = self_signed(), tmp_path / "ca.pem"
    wrong.write_text("no certificate")
    security = SecurityConfig(tls_cert=ours.cert, tls_key=ours.key, tls_client_ca=wrong)
    with pytest.raises(ConfigError, match=r"ca\.pem is not a certificate"):
        HttpServer("127.0.0.1", 0, security)


# --- the command line ---


@pytest.mark.e2e
async def test_the_command_line_calls_a_guarded_service(tmp_path):
    ours, client = self_signed(), self_signed("client")
    tokens = tmp_path / "tokens"
    tokens.write_text(TOKEN)
    tokens.chmod(0o600)
    security = SecurityConfig(
        api_key_file=tokens, tls_cert=ours.cert, tls_key=ours.key, tls_client_ca=client.cert
    )
    async with running(replace(config(), security=security)) as guarded:
        shown = ("--tls-ca", str(ours.cert), "--tls-cert", str(client.cert), "--tls-key", str(client.key))
        code, out, err = await generate(guarded.address, "--api-key-file", str(tokens), *shown)
        assert (code, bool(out)) == (0, True), err
        code, _, err = await generate(guarded.address, *shown)
        assert (code, "NO_TOKEN" in err) == (1, True), err
        code, _, err = await generate(guarded.address, "--api-key-file", str(tokens))
        assert (code, "no answer" in err) == (1, True), err


async def generate(address, *options):
    """Exit code, standard output and standard error of `tandem generate`."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "deploy.cli", "generate", "x", "--max-tokens", "3", "--server", address),
        *options,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode, out.decode(), err.decode()
