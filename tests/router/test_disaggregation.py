"""Split or local, from what each way costs."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from router.disaggregation import MIN_MEASURED, Costs, Decision, Disaggregation, Situation, Why, decide
from tandem.request import Timings

COSTS = Costs(split_s_per_token=1e-3, handoff_s=0.01, local_s_per_token=1e-3)
INFINITE = float("inf")


def decided(tokens=50, waiting=50, running=0, measured=MIN_MEASURED, most=64, cacheable=INFINITE):
    return decide(Situation(tokens, waiting, running), COSTS, measured, most, cacheable)


def test_an_idle_service_saves_the_hand_off():
    assert decided() == Decision(True, Why.CHEAPER)


def test_running_sequences_are_worth_the_hand_off():
    assert decided(running=1) == Decision(False, Why.CHEAPER)


def test_a_queue_outweighs_a_running_sequence():
    assert decided(running=1, waiting=100) == Decision(True, Why.CHEAPER)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"tokens": 65}, Why.LONG),
        ({"cacheable": 49}, Why.CACHED),
        ({"measured": MIN_MEASURED - 1}, Why.UNMEASURED),
    ],
)
def test_what_rules_a_prompt_out(changes, why):
    assert decided(**changes) == Decision(False, why)


SECONDS = st.floats(1e-6, 1.0)
SITUATIONS = st.builds(
    lambda tokens, more, running: Situation(tokens, tokens + more, running),
    st.integers(1, 500),
    st.integers(0, 5000),
    st.integers(0, 50),
)


@given(SITUATIONS, st.builds(Costs, SECONDS, SECONDS, SECONDS), st.integers(0, 5000), st.integers(0, 50))
def test_more_waiting_never_speaks_for_the_split_and_more_running_never_against_it(
    here, costs, more_waiting, more_running
):
    def is_local(situation):
        return decide(situation, costs, MIN_MEASURED, 10_000, INFINITE).is_local

    longer = Situation(here.tokens, here.waiting_tokens + more_waiting, here.num_running)
    busier = Situation(here.tokens, here.waiting_tokens, here.num_running + more_running)
    assert is_local(longer) >= is_local(here) >= is_local(busier)


def test_costs_are_learnt_from_the_requests_themselves():
    one = Disaggregation("auto", 100, INFINITE)
    split = one.decide(10, 10, "d")
    assert split == Decision(False, Why.UNMEASURED)
    for _ in range(MIN_MEASURED):
        one.note(split, 10, Timings(prefill_ms=10, kv_write_ms=2, kv_wait_ms=1, kv_read_ms=3))
    local = one.decide(10, 10, "d")
    assert local == Decision(True, Why.CHEAPER)
    for _ in range(20):
        one.note(local, 10, Timings(prefill_ms=40))  # it turns out to be slower there
    assert one.decide(10, 10, "d") == Decision(False, Why.CHEAPER)


def test_who_runs_where_is_counted_while_it_runs():
    one = Disaggregation("auto", 100, INFINITE)
    for _ in range(MIN_MEASURED):
        one.note(Decision(False, Why.UNMEASURED), 10, Timings(prefill_ms=10, kv_read_ms=6))
    one.begin("busy")
    assert not one.decide(10, 10, "busy").is_local
    assert one.decide(10, 10, "idle").is_local
    one.end("busy")
    assert one.decide(10, 10, "busy").is_local


@pytest.mark.parametrize(("mode", "name"), [("always", "split/always"), ("never", "local/never")])
def test_fixed_modes_ask_nothing(mode, name):
    assert Disaggregation(mode, 100, INFINITE).decide(1, 1, "d").name == name
