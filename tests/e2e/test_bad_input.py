"""What must be refused is refused before it takes anything, in the documented words, and only those."""

from __future__ import annotations

import asyncio
import logging

import grpc
import pytest
import pytest_asyncio

from tandem.pb.v1 import generation_pb2 as pb
from tandem.pb.v1 import generation_pb2_grpc, model_pb2, model_pb2_grpc
from tests.checkpoints import VOCAB_SIZE
from tests.e2e.harness import Failure, ask, complete, failure, generate, quiesce

pytestmark = pytest.mark.asyncio(loop_scope="module")

CANARY = "kanarienvogel"
NAN, INF = float("nan"), float("inf")
METHODS = {
    "GenerationService": ("Generate", "StreamGenerate", "CancelGeneration", "Tokenize", "Detokenize"),
    "ModelService": ("ListModels", "GetModel"),
}
MALFORMED = (b"\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x05\x12", b"\x0b" * 200)


def figure(name, low, high, bracket="["):
    return f"`{name}` must be a finite number in {bracket}{low}, {high}]"


BAD_PARAMS = [
    *(
        ({"temperature": value}, figure("temperature", 0, 2))
        for value in (NAN, INF, -INF, -0.001, 2.001, 1e308)
    ),
    *(({"top_p": value}, figure("top_p", 0, 1, "(")) for value in (NAN, 0.0, -0.1, 1.001)),
    *(({"min_p": value}, figure("min_p", 0, 1)) for value in (NAN, -0.001, 1.001)),
    *(
        ({"repetition_penalty": value}, figure("repetition_penalty", 0, 10, "("))
        for value in (NAN, 0.0, -1.0, 10.01)
    ),
    *(({"presence_penalty": value}, figure("presence_penalty", -2, 2)) for value in (NAN, -2.01, 2.01)),
    *(({"frequency_penalty": value}, figure("frequency_penalty", -2, 2)) for value in (NAN, -2.01, 2.01)),
    *(({"logit_bias": {5: value}}, figure("logit_bias", -100, 100)) for value in (NAN, INF, -100.1, 100.1)),
    ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "`logit_bias` may name at most 1024 tokens"),
    *(
        ({"logit_bias": {token: 1.0}}, f"`logit_bias` holds a token id outside [0, {VOCAB_SIZE})")
        for token in (VOCAB_SIZE, 2**31, 2**32 - 1)
    ),
    ({"max_tokens": 0}, "`max_tokens` must be at least 1"),
    ({"max_tokens": 4, "min_tokens": 5}, "`min_tokens` must be between 0 and max_tokens"),
    ({"min_tokens": 513}, "`min_tokens` must be between 0 and max_tokens"),
    ({"min_tokens": 2**32 - 1}, "`min_tokens` must be between 0 and max_tokens"),
    *(({"n": value}, "`n` must be in [1, 8]") for value in (0, 9, 2**32 - 1)),
    *(({"logprobs": value}, "`logprobs` must be in [0, 20]") for value in (21, 2**31)),
    ({"stop": [f"{CANARY}{i}" for i in range(17)]}, "`stop` may hold at most 16 strings"),
    *(
        ({"stop": [value]}, "each `stop` string must have 1 to 128 bytes")
        for value in ("", "x" * 129, "é" * 65, CANARY * 50)
    ),
    ({"stop_token_ids": range(65)}, "`stop_token_ids` may hold at most 64 ids"),
    ({"stop_token_ids": [VOCAB_SIZE]}, f"`stop_token_ids` holds a token id outside [0, {VOCAB_SIZE})"),
]
GOOD_EDGES = [
    {"temperature": 2.0, "top_p": 1.0, "min_p": 1.0},
    {"temperature": -0.0, "top_p": 5e-324, "min_p": 0.0},
    {"repetition_penalty": 10.0, "presence_penalty": -2.0, "frequency_penalty": 2.0},
    {"logit_bias": {0: -100.0, VOCAB_SIZE - 1: 100.0}},
    {"top_k": 2**32 - 1, "temperature": 1.0},
    {"n": 8, "temperature": 1.0},
    {"logprobs": 20},
    {"stop": [f"{i:0128d}" for i in range(16)]},
    {"stop_token_ids": range(64)},
    {"min_tokens": 3, "max_tokens": 3},
]


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def _nothing_taken_and_nothing_told(cluster, caplog):
    """Whatever a test sends: nothing of it is in the log, and the same channel works on."""
    with caplog.at_level(logging.DEBUG):
        yield
    assert CANARY not in caplog.text
    assert (await complete(cluster, ask(CANARY, max_tokens=2, ignore_eos=True))).reason == "LENGTH"
    await quiesce(cluster)


@pytest.fixture
def nothing_starts(cluster, monkeypatch):
    """The dispatcher, behind which memory is taken, must not hear of a request."""

    def start(requests):
        raise AssertionError("a bad request came through the door")

    monkeypatch.setattr(cluster.router.dispatcher, "start", start)
    yield
    monkeypatch.undo()


def check(failed: Failure, code: str, reason: str, message: str) -> None:
    assert (failed.code, failed.reason, failed.message) == (code, reason, message)
    assert failed.text == f"{reason}: {message} (error_id={failed.error.error_id})"
    everything = failed.text + repr(failed.trailing)
    for secret in (CANARY, "Traceback", "Error(", ".py", "127.0.0.1"):
        assert secret not in everything


@pytest.mark.parametrize(("sampling", "message"), BAD_PARAMS, ids=lambda value: str(value)[:40])
@pytest.mark.usefixtures("nothing_starts")
async def test_each_parameter_just_outside_its_range(cluster, sampling, message):
    for send in (complete, generate):
        check(await failure(send(cluster, ask(CANARY, **sampling))), "INVALID_ARGUMENT", "BAD_PARAM", message)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt must have at least one token"),
        ([], "the prompt must have at least one token"),
        (None, "one of `text` and `token_ids` must be given"),
        ([1, VOCAB_SIZE], f"`token_ids` must be in [0, {VOCAB_SIZE})"),
        ([2**31], f"`token_ids` must be in [0, {VOCAB_SIZE})"),
        ([2**32 - 1], f"`token_ids` must be in [0, {VOCAB_SIZE})"),
    ],
    ids=repr,
)
@pytest.mark.usefixtures("nothing_starts")
async def test_prompts_that_are_none(cluster, prompt, message):
    check(await failure(complete(cluster, ask(prompt))), "INVALID_ARGUMENT", "BAD_PARAM", message)


@pytest.mark.parametrize("name", ["a/b", "../x", "a b", "x" * 129, "é", "a#0", "line\nline", "127.0.0.1:80"])
@pytest.mark.usefixtures("nothing_starts")
async def test_request_ids_that_are_none(cluster, name):
    failed = await failure(complete(cluster, ask(CANARY, request_id=name)))
    check(failed, "INVALID_ARGUMENT", "BAD_REQUEST_ID", "request_id must match [A-Za-z0-9._-]{1,128}")


@pytest.mark.parametrize(
    ("seconds", "nanos"), [(2**62, 0), (-(2**62), 0), (1, 2**31 - 1), (1, -1), (315576000001, 0)]
)
@pytest.mark.usefixtures("nothing_starts")
async def test_timeouts_that_are_none(cluster, seconds, nanos):
    message = ask(CANARY)
    message.timeout.seconds, message.timeout.nanos = seconds, nanos
    wanted = "`timeout` must be a duration of at most 10000 years"
    check(await failure(complete(cluster, message)), "INVALID_ARGUMENT", "BAD_PARAM", wanted)


@pytest.mark.usefixtures("nothing_starts")
async def test_a_model_that_is_not_served(cluster):
    models = model_pb2_grpc.ModelServiceStub(cluster.channel)
    for asking in (
        complete(cluster, ask(CANARY, model=CANARY)),
        models.GetModel(model_pb2.GetModelRequest(model=CANARY)),
        models.GetModel(model_pb2.GetModelRequest()),
    ):
        check(await failure(asking), "NOT_FOUND", "NO_SUCH_MODEL", "not found")


@pytest.mark.usefixtures("nothing_starts")
async def test_text_that_is_too_long_is_not_even_tokenized(cluster):
    text = (CANARY * 30000)[: (256 << 10) + 1]
    generation = generation_pb2_grpc.GenerationServiceStub(cluster.channel)
    message = "prompt is 262145 bytes; the limit is 262144"
    for asking in (
        complete(cluster, ask(text)),
        complete(cluster, ask("é" * (1 << 17) + "x")),
        generation.Tokenize(pb.TokenizeRequest(text=text)),
    ):
        check(await failure(asking), "INVALID_ARGUMENT", "PROMPT_TOO_LONG", message)


async def test_text_of_the_most_bytes_has_its_tokens_counted(cluster):
    generation = generation_pb2_grpc.GenerationServiceStub(cluster.channel)
    text = "x" * (256 << 10)

    assert len((await generation.Tokenize(pb.TokenizeRequest(text=text))).token_ids) == len(text)
    check(
        await failure(complete(cluster, ask(text, max_tokens=1))),
        "INVALID_ARGUMENT",
        "PROMPT_TOO_LONG",
        "prompt is 262144 tokens; the limit is 512 minus max_tokens 1",
    )


async def test_detokenizing_what_is_no_token(cluster):
    generation = generation_pb2_grpc.GenerationServiceStub(cluster.channel)
    for token in (VOCAB_SIZE, 2**31, 2**32 - 1):
        failed = await failure(generation.Detokenize(pb.DetokenizeRequest(token_ids=[token])))
        check(failed, "INVALID_ARGUMENT", "BAD_PARAM", f"`token_ids` must be in [0, {VOCAB_SIZE})")


async def test_cancelling_what_is_not_there(cluster):
    generation = generation_pb2_grpc.GenerationServiceStub(cluster.channel)
    for name in (CANARY, "", "a/b", "x" * 100_000):
        failed = await failure(generation.CancelGeneration(pb.CancelGenerationRequest(request_id=name)))
        check(failed, "NOT_FOUND", "NO_SUCH_REQUEST", "not found")


@pytest.mark.parametrize(
    ("service", "method"), [(service, method) for service in METHODS for method in METHODS[service]]
)
@pytest.mark.usefixtures("nothing_starts")
async def test_malformed_bytes_on_every_method(cluster, service, method):
    path = f"/tandem.v1.{service}/{method}"
    kind = cluster.channel.unary_stream if method == "StreamGenerate" else cluster.channel.unary_unary
    for data in (*MALFORMED, b"\x0a" + bytes([len(CANARY) + 9]) + CANARY.encode()):
        call = kind(path)(data, timeout=10)
        failed = await failure(read(call))
        check(failed, "INVALID_ARGUMENT", "BAD_MESSAGE", "malformed request message")


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize(
    ("method", "data"),
    [
        ("StreamGenerate", b"\x0a\x04\x22\x02\xc3\x28"),
        ("Generate", b"\x0a\x05\x1a\x03\xed\xa0\x80"),
        ("Tokenize", b"\x0a\x02\xc3\x28"),
        ("CancelGeneration", b"\x0a\x01\x80"),
    ],
)
async def test_text_that_is_no_utf8(cluster, method, data):
    """A lone surrogate is none either."""
    path = f"/tandem.v1.GenerationService/{method}"
    kind = cluster.channel.unary_stream if method == "StreamGenerate" else cluster.channel.unary_unary
    failed = await failure(read(kind(path)(data, timeout=10)))
    check(failed, "INVALID_ARGUMENT", "BAD_MESSAGE", "malformed request message")


async def read(call):
    if hasattr(call, "read"):
        return [message async for message in call]
    return await call


async def test_the_table_of_methods_is_complete():
    services = {**pb.DESCRIPTOR.services_by_name, **model_pb2.DESCRIPTOR.services_by_name}
    methods = {name: tuple(m.name for m in service.methods) for name, service in services.items()}

    assert methods == METHODS


async def test_messages_over_the_limit_are_refused_by_grpc_and_the_channel_lives(cluster):
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await complete(cluster, ask("x" * (1 << 20)))
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_metadata_over_the_limit_is_refused_by_grpc_and_the_channel_lives(cluster):
    generation = generation_pb2_grpc.GenerationServiceStub(cluster.channel)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await generation.Tokenize(pb.TokenizeRequest(text="x"), metadata=(("x-much", "y" * 40_000),))
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_compressed_requests_are_refused(cluster):
    generation = generation_pb2_grpc.GenerationServiceStub(cluster.channel)
    bomb = pb.TokenizeRequest(text="x" * 900_000)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await generation.Tokenize(bomb, compression=grpc.Compression.Gzip)
    assert raised.value.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INTERNAL)


async def test_unknown_methods_are_unimplemented(cluster):
    for path in ("/tandem.v1.GenerationService/Nope", "/tandem.worker.v1.RegistryService/Heartbeat", "/x"):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await cluster.channel.unary_unary(path)(b"", timeout=10)
        assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_bytes_that_are_no_grpc_do_no_harm(cluster):
    host, port = cluster.address.split(":")
    for data in (
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x00" * 1000,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff",
    ):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(data)
        await asyncio.wait_for(reader.read(100), 10)
        writer.close()


class TestGood:
    """What is just inside the ranges works."""

    @pytest.mark.parametrize("sampling", GOOD_EDGES, ids=lambda value: str(value)[:40])
    async def test_each_parameter_just_inside_its_range(self, cluster, sampling):
        response = await generate(cluster, ask("edge", **{"max_tokens": 3, **sampling}))

        assert len(response.completions) == sampling.get("n", 1)

    @pytest.mark.parametrize(
        "prompt", ["\x00", "x" * 511, "‮‍", "<|endoftext|>", [0], [VOCAB_SIZE - 1]], ids=repr
    )
    async def test_strange_prompts_that_are_fine(self, cluster, prompt):
        assert (await complete(cluster, ask(prompt, max_tokens=1))).token_ids

    @pytest.mark.parametrize("name", ["x", "x" * 128, "A.b_c-9", "...", "-"])
    async def test_request_ids_that_are_fine(self, cluster, name):
        response = await generate(cluster, ask("x", request_id=name, max_tokens=1))

        assert response.request_id == name
