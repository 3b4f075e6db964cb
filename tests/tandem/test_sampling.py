"""Every parameter has a range; the ends are in, the next value out is not, and nothing odd slips by."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.errors import InvalidRequest
from tandem.sampling import SamplingParams

UP, DOWN = math.inf, -math.inf


def after(value: float, towards: float) -> float:
    return math.nextafter(value, towards)


GOOD = [
    ("temperature", [0, 2, -0.0]),
    ("top_p", [after(0, 1), 1]),
    ("min_p", [0, 1]),
    ("repetition_penalty", [after(0, 1), 10]),
    ("presence_penalty", [-2, 2]),
    ("frequency_penalty", [-2, 2]),
    ("max_tokens", [None, 1, 10**9]),
    ("min_tokens", [0, 5]),
    ("top_k", [0, 1, 10**9]),
    ("n", [1, 8]),
    ("logprobs", [None, 0, 20]),
    ("seed", [None, -(2**63), 2**63 - 1]),
    ("stop", [(), ("x",), ("x" * 128,), ("é" * 64,), ("s",) * 16]),
    ("stop_token_ids", [(), tuple(range(64))]),
    ("logit_bias", [{}, {5: -100}, {5: 100.0}, dict.fromkeys(range(1024), 0.0)]),
]
BAD = [
    ("temperature", [after(0, DOWN), after(2, UP)]),
    ("top_p", [0, after(1, UP)]),
    ("min_p", [after(0, DOWN), after(1, UP)]),
    ("repetition_penalty", [0, after(10, UP)]),
    ("presence_penalty", [after(-2, DOWN), after(2, UP)]),
    ("frequency_penalty", [after(-2, DOWN), after(2, UP)]),
    ("max_tokens", [0, -1]),
    ("min_tokens", [-1]),
    ("top_k", [-1]),
    ("n", [0, 9, 10**9]),
    ("logprobs", [-1, 21]),
    ("seed", [2**63, -(2**63) - 1]),
    ("stop", [("",), ("x" * 129,), ("é" * 65,), ("s",) * 17]),
    ("stop_token_ids", [tuple(range(65))]),
    ("logit_bias", [{5: -100.1}, {5: math.nan}, dict.fromkeys(range(1025), 0.0)]),
]
REALS = [
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in GOOD for value in values])
def test_the_ends_of_each_range_are_allowed(name, value):
    assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD for value in values])
def test_one_step_further_is_refused_by_name(name, value):
    with pytest.raises(InvalidRequest, match=f"`{name}`") as caught:
        SamplingParams(**{name: value})
    assert caught.value.reason == "BAD_PARAM"


@pytest.mark.parametrize("name", REALS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308, -1e308])
def test_numbers_that_are_none_are_refused(name, value):
    with pytest.raises(InvalidRequest, match=f"`{name}` must be a finite number"):
        SamplingParams(**{name: value})


def test_the_message_names_the_range_and_not_the_value():
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(temperature=7.25)
    assert caught.value.message == "`temperature` must be a finite number in [0, 2]"
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(top_p=0)
    assert caught.value.message == "`top_p` must be a finite number in (0, 1]"


def test_min_tokens_may_not_exceed_max_tokens():
    SamplingParams(min_tokens=5, max_tokens=5)
    with pytest.raises(InvalidRequest, match="min_tokens"):
        SamplingParams(min_tokens=6, max_tokens=5)


def test_a_lone_surrogate_in_a_stop_string_is_measured_and_not_fatal():
    SamplingParams(stop=("\ud800",))


def test_ids_outside_the_vocabulary_are_refused():
    SamplingParams(stop_token_ids=(0, 99), logit_bias={99: 1.0}).check_vocabulary(100)
    for params in (
        SamplingParams(stop_token_ids=(100,)),
        SamplingParams(stop_token_ids=(-1,)),
        SamplingParams(logit_bias={100: 1.0}),
        SamplingParams(logit_bias={-1: 1.0}),
    ):
        with pytest.raises(InvalidRequest, match="outside"):
            params.check_vocabulary(100)


def test_greedy_is_the_default_and_changes_nothing():
    assert SamplingParams().is_greedy
    assert not SamplingParams().changes_logits
    assert not SamplingParams(temperature=0.1).is_greedy


@pytest.mark.parametrize(
    "changes",
    [
        {"logit_bias": {1: 1.0}},
        {"min_tokens": 1},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
    ],
)
def test_penalties_and_biases_change_logits(changes):
    assert SamplingParams(**changes).changes_logits


@given(st.floats(), st.floats(), st.floats())
def test_any_float_is_either_in_range_or_refused(temperature, top_p, min_p):
    try:
        params = SamplingParams(temperature=temperature, top_p=top_p, min_p=min_p)
    except InvalidRequest:
        return
    assert 0 <= params.temperature <= 2
    assert 0 < params.top_p <= 1
    assert 0 <= params.min_p <= 1


ON_THE_WIRE = [
    (n, v) for n, values in GOOD for v in values if n not in ("stop", "logit_bias", "top_k", "max_tokens")
]


@pytest.mark.parametrize(("name", "value"), ON_THE_WIRE)
def test_the_wire_says_what_was_asked_and_no_defaults(name, value):
    params = SamplingParams(**{"max_tokens": 7, name: value})
    message = params.to_pb()
    assert SamplingParams.from_pb(message) == params
    said = {spec.name for spec, _ in message.ListFields()}
    assert said == {"max_tokens", *([name] if value != getattr(SamplingParams(), name) else [])}
