"""What no client library sends over HTTP: all of it is refused as the error contract says, and harmless."""

from __future__ import annotations

import asyncio
import json

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem.errors import REASONS
from tests.e2e.harness import config, quiesce, running
from tests.web import get, post, send

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = "tiny-llama"
JSON = "content-type: application/json"
COMPLETE = f"POST /v1/completions HTTP/1.1\n{JSON}"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster():
    async with running(config(router={"http_port": 0})) as started:
        yield started


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def _nothing_left_behind(cluster):
    yield
    await quiesce(cluster)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"1",
        b"\xff\xfe",
        b'{"prompt": NaN}',
        b'{"prompt": "x", "prompt": "y"}',
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"seed": ' + b"9" * 5000 + b"}",
    ],
)
async def test_what_is_no_json_object_is_a_bad_message(cluster, body):
    reply = await post(cluster.http_address, "/v1/completions", body)
    assert (reply.status, reply.code) == (400, "BAD_MESSAGE")


@pytest.mark.parametrize("num_bytes", [1 << 20, 12 << 20])
async def test_a_body_over_the_limit_is_refused_when_it_has_come(cluster, num_bytes):
    reply = await post(cluster.http_address, "/v1/completions", b'{"prompt": "%s"}' % (b"x" * num_bytes))
    assert (reply.status, reply.code) == (413, "BAD_MESSAGE")


@pytest.mark.parametrize(
    "more", ["content-length: 99999999", "content-length: 2000000\nexpect: 100-continue"]
)
async def test_a_body_over_the_limit_need_not_come(cluster, more):
    host, _, port = cluster.http_address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"{COMPLETE}\nhost: x\n{more}\n\n".replace("\n", "\r\n").encode())
    assert b" 413 " in await asyncio.wait_for(reader.readline(), 10)
    writer.close()


async def test_a_body_without_a_length_is_counted_as_it_comes(cluster):
    host, _, port = cluster.http_address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"{COMPLETE}\nhost: x\ntransfer-encoding: chunked\n\n".replace("\n", "\r\n").encode())
    writer.write(b"200000\r\n%s\r\n0\r\n\r\n" % (b"x" * 0x200000))
    assert b" 413 " in await asyncio.wait_for(reader.readline(), 10)
    writer.close()


@pytest.mark.parametrize(
    "head",
    [
        "POST /v1/completions HTTP/1.1",
        "POST /v1/completions HTTP/1.1\ncontent-type: text/plain",
        f"{COMPLETE}\ncontent-encoding: gzip",
    ],
)
async def test_other_media_are_refused(cluster, head):
    reply = await send(cluster.http_address, head, b'{"prompt": "x"}')
    assert (reply.status, reply.code) == (415, "BAD_MESSAGE")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"prompt": "\\ud800"}', "prompt"),
        (b'{"prompt": "x", "stop": "\\udfff"}', "stop"),
        (b'{"prompt": "x", "temperature": 1e999}', "temperature"),
        (b'{"prompt": "x", "top_p": ' + b"9" * 400 + b"}", "top_p"),
        (b'{"prompt": "x", "temperature": true}', "temperature"),
        (b'{"prompt": "x", "stream": 1}', "stream"),
        (b'{"prompt": "x", "\\ud800": 1}', "?"),
    ],
)
async def test_values_that_json_has_and_we_have_not_are_bad_parameters(cluster, body, param):
    reply = await post(cluster.http_address, "/v1/completions", body)
    assert (reply.status, reply.code) == (400, "BAD_PARAM")
    assert reply.json()["error"]["param"] == param


async def test_messages_without_a_chat_template_say_what_to_do(cluster):
    body = {"messages": [{"role": "user", "content": "x"}]}
    reply = await post(cluster.http_address, "/v1/chat/completions", body)
    assert (reply.status, reply.code) == (400, "BAD_PARAM")
    assert "use /v1/completions" in reply.json()["error"]["message"]


async def test_paths_and_methods_that_are_not_served_are_said_in_the_same_shape(cluster):
    nowhere = await get(cluster.http_address, "/v1/embeddings")
    wrong_method = await get(cluster.http_address, "/v1/completions")
    assert (nowhere.status, nowhere.code) == (404, "NO_SUCH_ENDPOINT")
    assert (wrong_method.status, wrong_method.code) == (405, "NO_SUCH_ENDPOINT")
    assert wrong_method.headers["allow"] == "post"


async def test_tokens_and_back(cluster):
    text = "héllo €"
    there = (await post(cluster.http_address, "/tokenize", {"prompt": text})).json()
    back = (await post(cluster.http_address, "/detokenize", {"tokens": there["tokens"]})).json()
    assert (there["count"], there["max_model_len"]) == (len(text.encode()), 512)
    assert back == {"prompt": text}
    for path, body in (
        ("/tokenize", {"prompt": 1}),
        ("/tokenize", {"prompt": "x", "add_special_tokens": 2}),
        ("/tokenize", {"prompt": "x", "other": 1}),
        ("/tokenize", {}),
        ("/detokenize", {"tokens": [300]}),
        ("/detokenize", {"tokens": "x"}),
    ):
        reply = await post(cluster.http_address, path, body)
        assert (reply.status, reply.code) == (400, "BAD_PARAM"), (path, body)


# Anything at all as the value of a parameter: an answer or an error of the contract, never a bug.
NAMES = (
    *("prompt", "model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "stop", "seed"),
    *("stop_token_ids", "logprobs", "echo", "best_of", "logit_bias", "priority", "timeout", "request_id"),
    *("presence_penalty", "repetition_penalty", "min_tokens", "ignore_eos", "speculation", "user", "tools"),
    *("num_assistant_tokens", "stream_options", "return_token_ids", "response_format"),
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, 2, -1, 2**31, 2**63, 0.5, 1e308, "x", "", MODEL])
    | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=2)
    ),
    max_leaves=4,
)


@given(body=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_whatever_a_body_holds_is_answered_or_refused(cluster, body):
    text = json.dumps({"prompt": "x", "max_tokens": 2} | body)
    reply = await post(cluster.http_address, "/v1/completions", text.encode())
    if reply.status == 200:
        assert reply.json()["choices"]
    else:
        assert reply.code in set(REASONS) - {"BUG", "NUMERICS"}, reply.body
