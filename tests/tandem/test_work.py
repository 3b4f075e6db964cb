"""Work orders and sampling parameters between processes: nothing lost, nothing senseless let in."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.errors import InvalidRequest, Overloaded, Unavailable
from tandem.pb.v1 import generation_pb2
from tandem.pb.worker.v1 import worker_pb2
from tandem.request import Request
from tandem.sampling import SamplingParams
from tandem.work import HOP_MARGIN_S, MAX_TIMEOUT_MS, Work, failure_from_pb, failure_to_pb

IDS = st.integers(0, 2**32 - 1)
STOP = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.none() | st.integers(10, 2**32 - 1),
    min_tokens=st.integers(0, 10),
    temperature=st.floats(0, 2),
    top_k=st.integers(0, 2**32 - 1),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0, 10, exclude_min=True),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    logit_bias=st.dictionaries(IDS, st.floats(-100, 100), max_size=5),
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    n=st.integers(1, 8),
    logprobs=st.none() | st.integers(0, 20),
    stop=st.lists(STOP, max_size=4).map(tuple),
    stop_token_ids=st.lists(IDS, max_size=5).map(tuple),
    ignore_eos=st.booleans(),
)


def make(**changes) -> Work:
    values = {
        "request_id": "r",
        "epoch": 3,
        "token_ids": (1, 2, 3, 4),
        "num_prompt_tokens": 3,
        "sampling": SamplingParams(max_tokens=10, seed=5),
        "deadline_s": time.monotonic() + 60,
        "fingerprint": bytes(32),
    }
    return Work(**(values | changes))


def over_the_wire(work: Work) -> Work:
    return Work.from_pb(worker_pb2.Work.FromString(work.to_pb().SerializeToString()))


@given(PARAMS)
def test_sampling_parameters_survive_the_wire_bit_for_bit(params):
    data = params.to_pb().SerializeToString()
    assert SamplingParams.from_pb(generation_pb2.SamplingParams.FromString(data)) == params


def test_absent_parameters_take_the_defaults_and_present_zeros_do_not():
    assert SamplingParams.from_pb(generation_pb2.SamplingParams()) == SamplingParams()
    message = generation_pb2.SamplingParams(logprobs=0, seed=0)
    assert SamplingParams.from_pb(message) == SamplingParams(logprobs=0, seed=0)


def test_parameters_out_of_range_are_refused_when_they_arrive():
    for message in (
        generation_pb2.SamplingParams(temperature=math.nan),
        generation_pb2.SamplingParams(max_tokens=0),
        generation_pb2.SamplingParams(n=0),
        generation_pb2.SamplingParams(stop=[""]),
    ):
        with pytest.raises(InvalidRequest) as caught:
            SamplingParams.from_pb(message)
        assert caught.value.reason == "BAD_PARAM"


@given(
    st.lists(IDS, min_size=1, max_size=20).map(tuple),
    st.integers(0, 9),
    st.integers(0, 2**64 - 1),
    PARAMS,
    st.binary(min_size=32, max_size=32),
)
def test_a_work_order_survives_the_wire(prompt, num_delivered, epoch, params, fingerprint):
    work = make(
        token_ids=prompt + (7,) * num_delivered,
        num_prompt_tokens=len(prompt),
        epoch=epoch,
        sampling=replace(params, max_tokens=10, seed=-1),
        fingerprint=fingerprint,
    )
    found = over_the_wire(work)
    assert replace(found, deadline_s=work.deadline_s) == work


def test_a_worker_has_a_little_less_time_than_the_router():
    work = make()
    assert 0 < work.deadline_s - over_the_wire(work).deadline_s <= 2 * HOP_MARGIN_S + 0.5


@pytest.mark.parametrize("time_left_s", [-5.0, 0.0, HOP_MARGIN_S])
def test_without_time_the_order_ends_at_once(time_left_s):
    assert make(deadline_s=time.monotonic() + time_left_s).to_pb().timeout_ms == 1


@pytest.mark.parametrize("time_left_s", [1e7, 1e15, math.inf])
def test_a_deadline_further_than_the_wire_can_say_is_the_furthest(time_left_s):
    assert make(deadline_s=time.monotonic() + time_left_s).to_pb().timeout_ms == MAX_TIMEOUT_MS


@pytest.mark.parametrize(
    "changes",
    [
        {"token_ids": ()},
        {"num_prompt_tokens": 0},
        {"num_prompt_tokens": 5},
        {"sampling": SamplingParams(seed=5)},
        {"sampling": SamplingParams(max_tokens=10)},
        {"sampling": SamplingParams(max_tokens=1, seed=5)},  # all its tokens are delivered already
    ],
)
def test_an_order_that_makes_no_sense_is_a_bad_message(changes):
    with pytest.raises(InvalidRequest) as caught:
        over_the_wire(make(**changes))
    assert caught.value.reason == "BAD_MESSAGE"


def test_a_request_becomes_an_order_with_everything_resolved():
    request = Request(
        request_id="r",
        token_ids=(1, 2, 3),
        num_prompt_tokens=2,
        sampling=SamplingParams(n=3, temperature=0.5),
        max_tokens=9,
        seed=4,
        deadline_s=77.0,
    )
    work, other = (Work.of(request, 6, b"f", router_id) for router_id in ("router-a", "router-b"))
    assert (work.key, work.max_tokens, work.seed) == (("r@router-a", 6), 9, 4)
    assert other.request_id != work.request_id, "two callers chose the same name"
    assert (work.sampling.n, work.sampling.temperature) == (1, 0.5)
    assert (work.token_ids, work.max_total_tokens, work.deadline_s) == ((1, 2, 3), 11, 77.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"token_ids": (1, 2, 3, 100)},
        {"token_ids": (100, 2, 3)},
        {"sampling": SamplingParams(max_tokens=9, seed=0, logit_bias={100: 1.0})},
        {"sampling": SamplingParams(max_tokens=9, seed=0, stop_token_ids=(100,))},
    ],
)
def test_ids_outside_the_vocabulary_are_refused_by_range(changes):
    make(**changes).check_vocabulary(101)
    with pytest.raises(InvalidRequest, match=r"outside \[0, 100\)"):
        make(**changes).check_vocabulary(100)


@given(
    st.sampled_from([InvalidRequest, Overloaded, Unavailable]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.none() | st.integers(0, 2**32 - 1),
    st.dictionaries(st.text("abc_", min_size=1), st.text("0123456789"), max_size=3),
)
def test_a_failure_keeps_its_meaning_on_the_wire(kind, message, retry_after_ms, metadata):
    reasons = {InvalidRequest: "NEVER_FITS", Overloaded: "NO_MEMORY_FIT_NOW", Unavailable: "DRAINING"}
    raised = kind(reasons[kind], message, retry_after_ms=retry_after_ms, metadata=metadata)
    wire = worker_pb2.WorkFailed.FromString(failure_to_pb(raised).SerializeToString())
    heard = failure_from_pb(wire)
    assert type(heard) is kind
    for name in ("reason", "message", "retry_after_ms", "metadata", "error_id"):
        assert getattr(heard, name) == getattr(raised, name), name
