"""Bodies of OpenAI's API to what is asked for: every parameter arrives, and none is ignored."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace

import pytest

from router.http.generation import parse_chat, parse_completion
from router.http.params import IDLE, LABELS
from tandem.chat_template import ChatTemplate
from tandem.errors import InvalidRequest
from tandem.sampling import SamplingParams
from tandem.speculation import SpeculationParams, SpeculationPolicy

INTAKE = SimpleNamespace(detokenize=lambda token_ids: f"<{token_ids}>")
TEMPLATE = ChatTemplate("{{ messages[0].content }}!", {})
SAMPLING = {
    "max_tokens": 7,
    "min_tokens": 2,
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.25,
    "min_p": 0.125,
    "repetition_penalty": 1.5,
    "presence_penalty": -1,
    "frequency_penalty": 2,
    "logit_bias": {"5": -3},
    "seed": -(2**63),
    "n": 2,
    "logprobs": 4,
    "stop": ["a", "b"],
    "stop_token_ids": [9],
    "ignore_eos": True,
}


def completion(**body):
    return parse_completion({"prompt": "x"} | body, INTAKE)


def chat(**body):
    return parse_chat({"messages": [{"role": "user", "content": "hi"}]} | body, TEMPLATE)


def refusal(parse, **body):
    with pytest.raises(InvalidRequest) as raised:
        parse(**body)
    assert raised.value.reason == "BAD_PARAM"
    return raised.value.message


def test_every_sampling_parameter_arrives():
    assert set(SAMPLING) == {field.name for field in fields(SamplingParams)}
    [ask] = completion(**SAMPLING).asks
    assert ask.sampling == SamplingParams(
        **SAMPLING | {"logit_bias": {5: -3}, "stop": ("a", "b"), "stop_token_ids": (9,)}
    )


def test_defaults_are_those_of_openai():
    assert completion().asks[0].sampling == SamplingParams(temperature=1.0, max_tokens=16)
    assert chat().asks[0].sampling == SamplingParams(temperature=1.0, max_tokens=None)
    assert completion(top_k=-1).asks[0].sampling.top_k == 0


def test_what_is_not_sampling_arrives_too():
    [ask] = completion(
        model="m",
        request_id="r",
        priority=-4,
        timeout=1.5,
        speculation="auto",
        num_assistant_tokens=3,
        assistant_confidence_threshold=0.4,
    ).asks
    assert (ask.model, ask.request_id, ask.priority, ask.timeout_s) == ("m", "r", -4, 1.5)
    assert ask.speculation == SpeculationParams(
        policy=SpeculationPolicy.AUTO, num_assistant_tokens=3, assistant_confidence_threshold=0.4
    )


def test_only_templates_write_their_own_special_tokens():
    assert completion().asks[0].add_special_tokens
    [ask] = chat().asks
    assert (ask.prompt, ask.add_special_tokens) == ("hi!", False)


def test_several_prompts_have_names_and_echoes_of_their_own():
    generation = completion(prompt=[[1], [2, 3]], request_id="r", echo=True)
    assert [ask.request_id for ask in generation.asks] == ["r-0", "r-1"]
    assert generation.echoes == ["<[1]>", "<[2, 3]>"]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_length_limit_are_understood(name):
    assert chat(**{name: 5}).asks[0].sampling.max_tokens == 5


def test_log_probabilities_of_a_chat_have_two_parameters():
    assert chat().asks[0].sampling.logprobs is None
    assert chat(logprobs=True).asks[0].sampling.logprobs == 0
    assert chat(logprobs=True, top_logprobs=4).asks[0].sampling.logprobs == 4
    assert "`top_logprobs` needs" in refusal(chat, top_logprobs=4)


@pytest.mark.parametrize("name", LABELS)
def test_labels_are_dropped(name):
    assert completion(**{name: "x"}).asks[0].sampling == completion().asks[0].sampling


@pytest.mark.parametrize("name", sorted(IDLE))
def test_features_there_are_not_are_refused_unless_idle(name):
    for idle in IDLE[name]:
        completion(**{name: idle})
    assert refusal(completion, **{name: {"some": "thing"}}) == f"`{name}` is not supported"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": []}, "`messages` must be a list of at least one message"),
        ({"messages": ["x"]}, "`messages` must be objects with a `role` and a `content`"),
        ({"messages": [{"content": "x"}]}, "`messages` must be objects with a `role` and a `content`"),
        ({"messages": [{"role": "user", "content": 1}]}, "must have a string or a list of text parts"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "parts of type text only"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "must agree"),
        ({"chat_template": "{{ 1 }}"}, "`chat_template` is not supported"),
        ({"chat_template_kwargs": {"messages": []}}, "may not set messages"),
        ({"add_generation_prompt": 3}, "must be true or false"),
    ],
)
def test_chats_that_make_no_prompt_are_refused(body, message):
    assert message in refusal(chat, **body)


def test_a_model_without_a_template_says_so():
    with pytest.raises(InvalidRequest, match="this model has none; use /v1/completions"):
        parse_chat({"messages": [{"role": "user", "content": "x"}]}, None)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": ["x"] * 65}, "1 to 64"),
        ({"prompt": [[1], "x"]}, "must be a string, a list of token ids"),
        ({"prompt": [True]}, "must be a string, a list of token ids"),
        ({"n": 1.0}, "`n` must be an integer"),
        ({"n": True}, "`n` must be an integer"),
        ({"priority": 2**31}, "`priority` must fit in 32 bits"),
        ({"stop": [1]}, "`stop` must be a string or a list of strings"),
        ({"stop": 0}, "`stop` must be a string or a list of strings"),
        ({"stop_token_ids": 0}, "`stop_token_ids` must be a list of integers"),
        ({"logit_bias": {"1": 10**400}}, "`logit_bias` must be a finite number"),
        ({"stream": True, "stream_options": {"x": 1}}, "`x` is not a parameter"),
        ({"unheard_of": 1}, "`unheard_of` is not a parameter"),
    ],
)
def test_wrong_types_and_unknown_names_are_refused(body, message):
    assert message in refusal(completion, **body)


def test_null_is_absent():
    body = dict.fromkeys([*SAMPLING, *IDLE, "stream", "stream_options", "unheard_of"])
    assert completion(**body).asks[0].sampling == completion().asks[0].sampling
