"""Split or local, from what each way costs."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given

from router.disaggregation import (
    MIN_MEASURED,
    NOTHING,
    Cached,
    Costs,
    Decision,
    Disaggregation,
    Situation,
    Why,
    decide,
)
from tandem.request import Timings

COSTS = Costs(split_s_per_token=1e-3, handoff_s=0.01, local_s_per_token=1e-3)


def decided(tokens=50, waiting=50, running=0, measured=MIN_MEASURED, most=64, cached=NOTHING):
    return decide(Situation(tokens, waiting, running, cached), COSTS, measured, most)


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
        ({"cached": Cached(wanted=48)}, Why.CACHEABLE),
        ({"cached": Cached(in_store=16, at_decode=32, wanted=48)}, Why.CACHEABLE),
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
        return decide(situation, costs, MIN_MEASURED, 10_000).is_local

    longer = Situation(here.tokens, here.waiting_tokens + more_waiting, here.num_running)
    busier = Situation(here.tokens, here.waiting_tokens, here.num_running + more_running)
    assert is_local(longer) >= is_local(here) >= is_local(busier)


def test_what_the_store_has_speaks_for_the_split():
    assert decided(cached=Cached(in_store=48, wanted=48)) == Decision(False, Why.CACHED)
    assert decided(running=1, cached=Cached(in_store=48, wanted=48)) == Decision(False, Why.CHEAPER)


def test_what_the_decode_worker_kept_speaks_for_it():
    kept = Cached(at_decode=48, wanted=48)
    assert decided(running=2, cached=kept) == Decision(True, Why.CACHED)
    assert decided(cached=kept) == Decision(True, Why.CHEAPER)
    assert decided(tokens=110, waiting=110, most=64, cached=Cached(at_decode=96)).is_local
    assert decided(tokens=110, waiting=110, most=64, cached=Cached(in_store=96)).why is Why.LONG


@given(SITUATIONS, st.builds(Costs, SECONDS, SECONDS, SECONDS), st.integers(0, 500), st.integers(0, 500))
def test_more_cached_on_one_side_never_speaks_for_the_other(here, costs, in_store, at_decode):
    def is_local(cached):
        return decide(replace(here, cached=cached), costs, MIN_MEASURED, 10_000).is_local

    plain = is_local(Cached(in_store, at_decode))
    assert is_local(Cached(in_store + 16, at_decode)) <= plain <= is_local(Cached(in_store, at_decode + 16))


def test_costs_are_learnt_from_the_requests_themselves():
    one = Disaggregation("auto", 100)
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
    one = Disaggregation("auto", 100)
    for _ in range(MIN_MEASURED):
        one.note(Decision(False, Why.UNMEASURED), 10, Timings(prefill_ms=10, kv_read_ms=6))
    one.begin("busy")
    assert not one.decide(10, 10, "busy").is_local
    assert one.decide(10, 10, "idle").is_local
    one.end("busy")
    assert one.decide(10, 10, "busy").is_local


@pytest.mark.parametrize(("mode", "name"), [("always", "split/always"), ("never", "local/never")])
def test_fixed_modes_ask_nothing(mode, name):
    assert Disaggregation(mode, 100).decide(1, 1, "d").name == name
