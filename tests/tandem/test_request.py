"""The life of a request: legal moves only, and a time line whose parts always sum to the whole."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.errors import InvalidRequest
from tandem.request import (
    STATUS_OF_REASON,
    TRANSITIONS,
    FinishReason,
    Lifecycle,
    Mark,
    Request,
    RequestStatus,
    Timings,
    check_request_id,
)
from tandem.sampling import SamplingParams
from tests.clock import ManualClock

S = RequestStatus
FINISHED = [status for status in S if status.is_finished]
PATHS = {
    S.QUEUED: [],
    S.PREFILL: [S.PREFILL],
    S.TRANSFER: [S.PREFILL, S.TRANSFER],
    S.DECODE: [S.PREFILL, S.TRANSFER, S.DECODE],
}


def at(status: S, clock=None) -> Lifecycle:
    life = Lifecycle(clock or ManualClock())
    for step in PATHS.get(status, [status]):
        life.to(step)
    return life


@pytest.mark.parametrize("start", S)
@pytest.mark.parametrize("end", S)
def test_only_the_moves_in_the_table_are_possible(start, end):
    life = at(start)
    if end in TRANSITIONS[start]:
        life.to(end)
        assert life.status is end
    else:
        with pytest.raises(ValueError, match=f"{start.name} → {end.name}"):
            life.to(end)
        assert life.status is start


def test_every_running_state_can_finish_in_every_way_or_be_planned_again():
    for status in PATHS:
        assert set(FINISHED) <= TRANSITIONS[status]
    assert all(S.QUEUED in TRANSITIONS[status] for status in (S.PREFILL, S.TRANSFER, S.DECODE))


def test_finished_is_final_and_contiguous():
    assert [status for status in S if status >= S.FINISHED_STOP] == FINISHED
    assert all(not TRANSITIONS[status] for status in FINISHED)
    assert all(status.name.startswith("FINISHED_") == status.is_finished for status in S)


def test_public_finish_reasons_are_the_openai_words():
    assert {reason.value for reason in FinishReason} == {"stop", "length"}
    assert STATUS_OF_REASON == {
        FinishReason.STOP: S.FINISHED_STOP,
        FinishReason.LENGTH: S.FINISHED_LENGTH,
    }


def test_each_transition_is_stamped():
    clock = ManualClock(10.0)
    life = Lifecycle(clock)
    for status in (S.PREFILL, S.TRANSFER, S.DECODE, S.FINISHED_STOP):
        clock.advance(1.0)
        life.to(status)
    assert life.stamps == [
        (S.QUEUED, 10.0),
        (S.PREFILL, 11.0),
        (S.TRANSFER, 12.0),
        (S.DECODE, 13.0),
        (S.FINISHED_STOP, 14.0),
    ]


def test_timings_charge_each_part_to_its_mark():
    clock = ManualClock()
    life = Lifecycle(clock)
    for milliseconds, mark in enumerate(Mark, start=1):
        clock.advance(milliseconds / 1e3)
        life.mark(mark)
    timings = life.timings()
    found = [getattr(timings, mark.value) for mark in Mark]
    assert found == pytest.approx([1, 2, 3, 4, 5, 6, 7])
    assert timings.total_ms == pytest.approx(28)


@given(st.lists(st.tuples(st.sampled_from(Mark), st.floats(-5, 5)), max_size=30))
def test_parts_sum_to_the_time_since_arrival_even_if_marks_come_out_of_order(marks):
    clock = ManualClock()
    life = Lifecycle(clock)
    latest_s = clock()
    for mark, offset_s in marks:
        life.mark(mark, at_s=clock() + offset_s)
        latest_s = max(latest_s, clock() + offset_s)
        clock.advance(0.1)
    timings = life.timings()
    parts = [getattr(timings, mark.value) for mark in Mark]
    assert min(parts) >= 0
    assert timings.total_ms == sum(parts) == pytest.approx(1e3 * (latest_s - life.received_s))


@pytest.mark.parametrize("name", ["a", "A-z_0.9", "x" * 128])
def test_good_ids_pass(name):
    assert check_request_id(name) == name


@pytest.mark.parametrize("name", ["", "x" * 129, "a b", "../x", "a/b", "a\n", "é", "a\0", "host:80"])
def test_bad_ids_are_refused_without_being_repeated(name):
    with pytest.raises(InvalidRequest) as caught:
        check_request_id(name)
    assert caught.value.reason == "BAD_REQUEST_ID"
    assert caught.value.message == "request_id must match [A-Za-z0-9._-]{1,128}"


def make_request(**changes) -> Request:
    values = {
        "request_id": "r",
        "token_ids": (1, 2, 3, 4),
        "num_prompt_tokens": 3,
        "sampling": SamplingParams(),
        "max_tokens": 10,
        "seed": 0,
        "deadline_s": 1.0,
    }
    return Request(**(values | changes))


def test_a_request_counts_its_tokens():
    request = make_request()
    assert (request.num_output_tokens, request.max_total_tokens) == (1, 13)


@pytest.mark.parametrize("num_prompt_tokens", [0, 5])
def test_the_border_of_the_prompt_lies_within_the_tokens(num_prompt_tokens):
    with pytest.raises(AssertionError):
        make_request(num_prompt_tokens=num_prompt_tokens)


def test_two_requests_are_equal_by_what_was_asked():
    assert make_request() == make_request()
    assert make_request() != make_request(seed=1)


@given(st.lists(st.floats(0, 1e6), min_size=9, max_size=9), st.sampled_from(["", "split", "local/short"]))
def test_timings_pass_the_wire_whole(parts, placement):
    names = [spec.name for spec in fields(Timings) if spec.name != "placement"]
    timings = Timings(**dict(zip(names, parts, strict=True)), placement=placement)
    message = timings.to_pb()
    assert Timings.from_pb(message) == timings
    assert message.transfer_hidden == timings.transfer_hidden
