"""The official OpenAI client against a running service, and the same tokens as over gRPC."""

from __future__ import annotations

import asyncio
import shutil

import openai
import pytest
import pytest_asyncio

from tandem.errors import Cancelled
from tests.checkpoints import EOS, tiny_llama
from tests.e2e.harness import (
    Result,
    ask,
    complete,
    config,
    gated_reads,
    generate,
    open_stream,
    quiesce,
    read_tokens,
    running,
    slow_steps,
    stream,
    until,
)
from tests.serving import tokenizer

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MODEL = "chatty"
IDS = {"return_token_ids": True}
SAMPLED = {"temperature": 0.9, "seed": 11, "max_tokens": 24}


def chatty_checkpoint(folder):
    path = folder / MODEL
    shutil.copytree(tiny_llama(), path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory):
    path = chatty_checkpoint(tmp_path_factory.mktemp("openai"))
    async with running(config(model={"path": path}, router={"http_port": 0, "max_queue": 4})) as started:
        yield started


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(cluster):
    async with openai.AsyncOpenAI(
        base_url=f"http://{cluster.http_address}/v1", api_key="none", max_retries=0, timeout=30
    ) as started:
        yield started


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def _nothing_left_behind(cluster):
    yield
    await quiesce(cluster)


async def finished(chunks):
    """The chunks of a stream in order."""
    return [chunk async for chunk in chunks]


# --- what is served ---


async def test_the_model_is_listed_and_described(client):
    [listed] = (await client.models.list()).data
    assert listed == await client.models.retrieve(MODEL)
    assert (listed.id, listed.owned_by, listed.max_model_len) == (MODEL, "tandem", 512)
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("other")


# --- the same tokens as over gRPC ---


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0, "max_tokens": 20},
        SAMPLED,
        SAMPLED | {"top_p": 0.7, "presence_penalty": 0.5, "frequency_penalty": -0.3},
        SAMPLED | {"top_k": 5, "min_p": 0.05, "repetition_penalty": 1.2, "min_tokens": 10},
        SAMPLED | {"logit_bias": {101: 8.0, 7: -100.0}, "ignore_eos": True},
        SAMPLED | {"stop_token_ids": [101, 110]},
    ],
)
async def test_the_same_request_has_the_same_tokens_over_grpc_and_http(cluster, client, sampling):
    wanted = await complete(cluster, ask("a story", **sampling))
    body = sampling | {"logit_bias": {str(k): v for k, v in sampling.get("logit_bias", {}).items()}} | IDS

    whole = await client.completions.create(model=MODEL, prompt="a story", extra_body=body)
    chunks = await finished(
        await client.completions.create(model=MODEL, prompt="a story", stream=True, extra_body=body)
    )

    [choice] = whole.choices
    assert choice.token_ids == wanted.token_ids
    assert choice.text == wanted.text
    *content, end = chunks
    assert [token for chunk in content for token in chunk.choices[0].token_ids] == wanted.token_ids
    assert "".join(chunk.choices[0].text for chunk in chunks) == wanted.text
    assert whole.usage.prompt_tokens == 7
    assert whole.usage.completion_tokens == len(wanted.token_ids)
    assert whole.usage.total_tokens == 7 + len(wanted.token_ids)
    assert choice.finish_reason == end.choices[0].finish_reason == wanted.reason.lower()


async def test_a_chat_is_the_completion_of_its_rendered_prompt(client):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "héllo"}]
    rendered = "<system>be brief<user>héllo<assistant>"
    chat = await client.chat.completions.create(model=MODEL, messages=messages, **SAMPLED)
    plain = await client.completions.create(model=MODEL, prompt=rendered, **SAMPLED)
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    in_parts = await client.chat.completions.create(model=MODEL, messages=parts, **SAMPLED)

    [choice] = chat.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == plain.choices[0].text == in_parts.choices[0].message.content
    assert chat.usage.prompt_tokens == len(rendered.encode())
    assert chat.object == "chat.completion"


async def test_prompts_of_token_ids_and_lists_of_prompts(client):
    texts = ["first", "second"]
    settings = {"model": MODEL, "temperature": 0, "max_tokens": 6}
    single = [(await client.completions.create(prompt=t, **settings)).choices[0].text for t in texts]
    as_list = await client.completions.create(prompt=texts, **settings)
    as_ids = await client.completions.create(prompt=[tokenizer().encode(text) for text in texts], **settings)

    for many in (as_list, as_ids):
        assert [choice.text for choice in many.choices] == single
        assert [choice.index for choice in many.choices] == [0, 1]
        assert many.usage.prompt_tokens == len("".join(texts))
        assert many.usage.completion_tokens == 12


async def test_echo_begins_with_the_prompt(client):
    settings = {"model": MODEL, "prompt": "abc", "temperature": 0, "max_tokens": 4}
    plain = (await client.completions.create(**settings)).choices[0].text
    echoed = (await client.completions.create(**settings, echo=True)).choices[0].text
    chunks = await finished(await client.completions.create(**settings, echo=True, stream=True))
    assert echoed == "abc" + plain
    assert "".join(chunk.choices[0].text for chunk in chunks) == echoed


# --- parameters ---


async def test_n_completions_are_those_of_grpc_and_count_the_prompt_once(cluster, client):
    wanted = (await generate(cluster, ask("a story", n=3, **SAMPLED))).completions
    whole = await client.completions.create(model=MODEL, prompt="a story", n=3, **SAMPLED)
    chunks = await finished(
        await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "x"}], n=3, stream=True, **SAMPLED
        )
    )

    assert [choice.text for choice in whole.choices] == [completion.text for completion in wanted]
    assert len({choice.text for choice in whole.choices}) == 3
    assert whole.usage.prompt_tokens == 7
    assert whole.usage.completion_tokens == sum(len(c.token_ids) for c in wanted)
    ends = [choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    roles = [choice.index for chunk in chunks for choice in chunk.choices if choice.delta.role]
    assert sorted(ends) == sorted(roles) == [0, 1, 2]


async def test_a_stop_string_ends_the_text_before_it(client):
    settings = {"model": MODEL, "prompt": "a story", "temperature": 0, "max_tokens": 40}
    text = (await client.completions.create(**settings)).choices[0].text
    stop = text[10:13]
    [choice] = (await client.completions.create(**settings, stop=[stop, "\0"])).choices
    chunks = await finished(await client.completions.create(**settings, stop=stop, stream=True))

    assert choice.text == text[: text.index(stop)]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text


async def test_the_end_of_text_token_ends_a_completion_and_is_no_text(client):
    biased = {"logit_bias": {str(EOS): 100}}
    [choice] = (await client.completions.create(model=MODEL, prompt="x", **biased)).choices
    [chunk_first, chunk_last] = await finished(
        await client.completions.create(model=MODEL, prompt="x", stream=True, **biased)
    )
    assert (choice.text, choice.finish_reason) == ("", "stop")
    assert (chunk_first.choices[0].text, chunk_last.choices[0].finish_reason) == ("", "stop")


async def test_log_probabilities_have_both_of_their_forms(cluster, client):
    wanted = await complete(cluster, ask("a story", logprobs=3, temperature=0.0, max_tokens=12))
    settings = {"model": MODEL, "temperature": 0, "max_tokens": 12}
    plain = await client.completions.create(prompt="a story", logprobs=3, **settings)
    chat = await client.chat.completions.create(
        messages=[{"role": "user", "content": "x"}], logprobs=True, top_logprobs=3, **settings
    )

    found = plain.choices[0].logprobs
    assert found.token_logprobs == pytest.approx([entry.logprob for entry in wanted.logprobs])
    assert all(len(top) == 3 for top in found.top_logprobs)  # greedy: the chosen one is among them
    for top, chosen in zip(found.top_logprobs, found.token_logprobs, strict=True):
        assert max(top.values()) == chosen
    assert found.text_offset[0] == 0
    assert found.text_offset == sorted(found.text_offset)

    content = chat.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in content).decode("utf-8", "replace") == (
        chat.choices[0].message.content
    )
    assert all(len(entry.top_logprobs) == 3 for entry in content)
    assert all(entry.top_logprobs[0].bytes == entry.bytes for entry in content)


async def test_streamed_log_probabilities_are_those_of_the_whole(client):
    settings = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "logprobs": True} | SAMPLED
    whole = await client.chat.completions.create(**settings)
    chunks = await finished(await client.chat.completions.create(**settings, stream=True))
    pieces = [
        entry for c in chunks for choice in c.choices if choice.logprobs for entry in choice.logprobs.content
    ]
    assert [e.token for e in pieces] == [e.token for e in whole.choices[0].logprobs.content]
    assert len(pieces) == whole.usage.completion_tokens


# --- streams ---


async def test_a_stream_has_the_order_that_clients_rely_on(client):
    chunks = await finished(
        await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "x"}],
            stream=True,
            stream_options={"include_usage": True},
            **SAMPLED,
        )
    )
    *content, end, usage = chunks

    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    assert chunks[0].id.startswith("chatcmpl-")
    assert content[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in content[1:])
    assert all(chunk.choices[0].finish_reason is None for chunk in content)
    assert end.choices[0].finish_reason in ("stop", "length")
    assert end.choices[0].delta.content is None
    assert usage.choices == []
    assert usage.usage.completion_tokens <= SAMPLED["max_tokens"]
    assert all(chunk.usage is None for chunk in (*content, end))


async def test_the_first_token_is_sent_before_the_second_is_computed(cluster, client):
    with gated_reads(cluster.decodes[0], before=True) as gate:
        chunks = await client.completions.create(model=MODEL, prompt="x", stream=True, max_tokens=5)
        first = await anext(chunks)
        assert first.choices[0].finish_reason is None
        assert gate.num_passed == 0
        gate.open()
        rest = await finished(chunks)
    assert rest[-1].choices[0].finish_reason


async def test_leaving_a_stream_cancels_the_request(cluster, client):
    with slow_steps(cluster.decodes[0]):
        chunks = await client.completions.create(
            model=MODEL, prompt="x", stream=True, max_tokens=300, n=2, extra_body={"ignore_eos": True}
        )
        for _ in range(6):
            await anext(chunks)
        assert cluster.router.dispatcher.num_flights == 2
        await chunks.close()
        await until(lambda: not cluster.router.dispatcher.num_flights)
        await quiesce(cluster)  # while a step is slow: nobody waited for the 300th


async def test_leaving_a_whole_answer_cancels_the_request(cluster, client):
    with slow_steps(cluster.decodes[0]):
        asking = asyncio.create_task(
            client.completions.create(
                model=MODEL, prompt="x", max_tokens=300, extra_body={"ignore_eos": True}
            )
        )
        await until(lambda: cluster.router.dispatcher.num_flights)
        asking.cancel()
        await until(lambda: not cluster.router.dispatcher.num_flights)
        await quiesce(cluster)


async def test_a_stream_that_fails_ends_with_the_error(cluster, client):
    body = {"request_id": "doomed", "ignore_eos": True}
    with slow_steps(cluster.decodes[0]):
        chunks = await client.completions.create(
            model=MODEL, prompt="x", stream=True, max_tokens=300, extra_body=body
        )
        for _ in range(3):
            await anext(chunks)
        cluster.router.dispatcher.cancel("doomed", Cancelled("ADMIN_ABORT"))
        with pytest.raises(openai.APIError, match="cancelled by operator") as raised:
            await finished(chunks)
    assert raised.value.code == "ADMIN_ABORT"


# --- errors ---


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"n": 9}, "n"),
        ({"top_k": 2**40}, "top_k"),
        ({"seed": 2**64}, "seed"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"300": 1}}, "logit_bias"),
        ({"logprobs": 1, "echo": True}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"speculation": "maybe"}, "speculation"),
        ({"temprature": 1}, "temprature"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [[1], [300]]}, "token_ids"),
    ],
)
async def test_a_bad_parameter_is_named(client, body, param):
    with pytest.raises(openai.BadRequestError) as raised:
        await client.completions.create(model=MODEL, prompt="x", extra_body=body)
    assert (raised.value.code, raised.value.param) == ("BAD_PARAM", param)
    assert raised.value.type == "invalid_request_error"


async def test_what_does_not_fit_is_refused_with_the_numbers(client):
    with pytest.raises(openai.BadRequestError, match="512") as raised:
        await client.completions.create(model=MODEL, prompt="x" * 500, max_tokens=100)
    assert raised.value.code == "PROMPT_TOO_LONG"


async def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as raised:
        await client.completions.create(model="other", prompt="x")
    assert raised.value.code == "NO_SUCH_MODEL"


async def test_a_name_in_use_is_a_conflict(cluster, client):
    with slow_steps(cluster.decodes[0]):
        call = open_stream(cluster, ask("x", request_id="taken", max_tokens=200, ignore_eos=True))
        await read_tokens(call, Result(), 3)
        with pytest.raises(openai.ConflictError) as raised:
            await client.completions.create(model=MODEL, prompt="x", extra_body={"request_id": "taken"})
        call.cancel()
    assert raised.value.code == "ID_REUSED_DIFFERENT_BODY"
    assert raised.value.response.headers["x-should-retry"] == "false"


async def test_a_full_queue_is_a_rate_limit_with_a_hint(cluster, client):
    with gated_reads(cluster.decodes[0], before=True) as gate:
        long = ask("x", max_tokens=500, n=8)  # of 32 blocks each: they fill the pool of 256
        call = open_stream(cluster, long)
        await call.read()
        waiting = open_stream(cluster, ask("x", max_tokens=500, n=4))
        await until(lambda: cluster.router.dispatcher.planner.snapshot().length >= 4)
        with pytest.raises(openai.RateLimitError) as raised:
            await client.completions.create(model=MODEL, prompt="x", max_tokens=500, stream=True)
        call.cancel()
        waiting.cancel()
        gate.open()
    assert raised.value.code == "QUEUE_FULL"
    headers = raised.value.response.headers
    assert int(headers["retry-after"]) == -(-int(headers["retry-after-ms"]) // 1000) >= 1
    assert headers["x-should-retry"] == "true"


async def test_a_deadline_that_passes_is_a_timeout(cluster, client):
    with slow_steps(cluster.decodes[0]), pytest.raises(openai.InternalServerError) as raised:
        await client.completions.create(
            model=MODEL, prompt="x", max_tokens=400, extra_body={"timeout": 0.5, "ignore_eos": True}
        )
    assert raised.value.status_code == 504
    assert raised.value.code == "DEADLINE_DECODE"


async def test_speculation_can_be_chosen_and_does_not_change_the_tokens(client):
    texts = [
        (await client.completions.create(model=MODEL, prompt="x", extra_body=body, **SAMPLED)).choices[0].text
        for body in ({"speculation": "off"}, {"speculation": "exact", "num_assistant_tokens": 2})
    ]
    assert texts[0] == texts[1]


async def test_several_streams_over_http_and_grpc_at_once(cluster, client):
    async def over_http(seed):
        chunks = await client.completions.create(
            model=MODEL, prompt="a story", stream=True, **SAMPLED | {"seed": seed}
        )
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async def over_grpc(seed):
        return (await stream(cluster, ask("a story", **SAMPLED | {"seed": seed})))[0].text

    texts = await asyncio.gather(*map(over_http, range(2)), *map(over_grpc, range(2)))
    assert texts[:2] == texts[2:]
