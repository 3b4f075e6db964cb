"""Split or local, from what each way costs."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given

from router.disaggregation import (
    MIN_MEASURED,
    NOTHING,
    UNNOTICED_S,
    Cached,
    Costs,
    Decision,
    Disaggregation,
    Situation,
    Why,
    decide,
)
from tandem.request import Timings
from tandem.token_cost import LEAST_CHUNK_TOKENS

COSTS = Costs(split_s_per_token=1e-3, handoff_s=0.01, local_s_per_token=1e-3)


def decided(tokens=50, queued=0, queued_there=0, running=0, measured=MIN_MEASURED, most=64, cached=NOTHING):
    return decide(Situation(tokens, queued, queued_there, running, cached), COSTS, measured, most)


def test_an_idle_service_saves_the_hand_off():
    assert decided() == Decision(True, Why.CHEAPER)


def test_running_sequences_are_worth_the_hand_off():
    assert decided(running=1) == Decision(False, Why.CHEAPER)


def test_a_queue_outweighs_a_running_sequence():
    assert decided(running=1, queued=50) == Decision(True, Why.CHEAPER)


def test_prompts_in_line_at_the_decode_worker_are_worth_the_hand_off():
    assert decided(queued_there=9) == Decision(True, Why.CHEAPER)
    assert decided(queued_there=11) == Decision(False, Why.CHEAPER)
    assert decided(queued_there=60, queued=60) == Decision(True, Why.CHEAPER)


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


SECONDS = st.floats(1e-5, 1e-2)
SITUATIONS = st.builds(
    Situation,
    tokens=st.integers(1, 500),
    prefill_queue=st.integers(0, 5000),
    local_queue=st.integers(0, 5000),
    num_running=st.integers(0, 50),
    cached=st.builds(Cached, st.integers(0, 500), st.integers(0, 500)),
)
MEASURED = st.builds(Costs, SECONDS, SECONDS, SECONDS)


@given(SITUATIONS, MEASURED)
def test_the_side_whose_predicted_cost_is_higher_is_never_chosen(here, costs):
    chosen = decide(here, costs, MIN_MEASURED, 10_000)
    local_s, split_s = costs.local_s(here), costs.split_s(here)
    assert (local_s <= split_s) if chosen.is_local else (split_s <= local_s)


@given(SITUATIONS, MEASURED)
def test_on_shared_cores_a_prompt_stays_where_nobody_notices_it(here, costs):
    shared = replace(here, shares_cores=True)
    found = decide(shared, costs, MIN_MEASURED, 10_000)
    if costs.local_s_per_token * LEAST_CHUNK_TOKENS <= UNNOTICED_S:
        assert found == Decision(True, Why.SHARED)
    else:
        assert found == decide(here, costs, MIN_MEASURED, 10_000)
    assert decide(shared, costs, MIN_MEASURED, 0) == Decision(False, Why.LONG)
    assert decide(shared, costs, MIN_MEASURED - 1, 10_000) == Decision(False, Why.UNMEASURED)
    wanted = replace(shared, cached=Cached(wanted=16))
    assert decide(wanted, costs, MIN_MEASURED, 10_000) == Decision(False, Why.CACHEABLE)


@given(SITUATIONS, MEASURED, st.floats(0.001, 1.0))
def test_a_prompt_of_several_chunks_is_split_where_one_would_be_too_long(here, costs, most_s):
    found = decide(here, costs, MIN_MEASURED, 10_000, most_s=most_s)
    is_noticed = costs.local_s_per_token * LEAST_CHUNK_TOKENS > most_s
    if is_noticed and here.cached.left_at_decode(here.tokens) > LEAST_CHUNK_TOKENS:
        assert found == Decision(False, Why.NOTICED)
    else:
        assert found == decide(here, costs, MIN_MEASURED, 10_000)
    kept = replace(here, cached=Cached(at_decode=max(here.tokens - LEAST_CHUNK_TOKENS, 0)))
    assert decide(kept, costs, MIN_MEASURED, 10_000, most_s=most_s).why is not Why.NOTICED


@pytest.mark.parametrize(("limit_s", "is_local"), [(0.0, False), (0.1, False), (0.25, True), (1.0, True)])
def test_what_nobody_notices_follows_from_the_limit_of_gaps(limit_s, is_local):
    """64 tokens take 128 ms there. With ten sequences running the split costs less, on cores of its own."""
    one = Disaggregation("auto", 1000, limit_s)
    for _ in range(MIN_MEASURED):
        one.note(Decision(False, Why.UNMEASURED), 100, Timings(prefill_ms=200, kv_read_ms=1))
    for number in range(10):
        one.loads.begin("d", (f"r{number}", 1))
    wanted = (
        Decision(True, Why.SHARED) if is_local else Decision(False, Why.NOTICED if limit_s else Why.CHEAPER)
    )
    assert one.decide(100, 0, "d", shares_cores=True) == wanted
    assert not one.decide(100, 0, "d").is_local
    for _ in range(100):
        one.note(Decision(True, Why.SHARED), 100, Timings(prefill_ms=5000))  # mostly waiting for others
    assert one.decide(100, 0, "d", shares_cores=True, token_s=0.002) == wanted


def test_a_limit_for_a_fast_model_leaves_room_for_chunks():
    """64 tokens take 6.4 ms there: within what a step leaves of 20 ms, and not of 10."""
    for limit_s, wanted in ((0.02, Why.SHARED), (0.01, Why.NOTICED)):
        one = Disaggregation("auto", 1000, limit_s)
        for _ in range(MIN_MEASURED):
            one.note(Decision(False, Why.UNMEASURED), 100, Timings(prefill_ms=10, kv_read_ms=1))
        assert one.decide(100, 0, "d", shares_cores=True).why is wanted


@given(SITUATIONS, MEASURED, st.integers(1, 5000))
def test_a_predicted_cost_grows_with_what_is_queued_on_its_side_and_with_nothing_else(here, costs, more):
    behind_prefill = replace(here, prefill_queue=here.prefill_queue + more)
    behind_local = replace(here, local_queue=here.local_queue + more)
    busier = replace(here, num_running=here.num_running + more)
    assert costs.split_s(behind_prefill) > costs.split_s(here)
    assert costs.local_s(behind_prefill) == costs.local_s(here)
    assert min(costs.local_s(behind_local), costs.local_s(busier)) > costs.local_s(here)
    assert costs.split_s(behind_local) == costs.split_s(busier) == costs.split_s(here)


@given(SITUATIONS, MEASURED, st.integers(0, 500))
def test_what_is_stored_is_computed_by_neither_side_and_what_is_kept_not_where_it_is(here, costs, more):
    cached = here.cached
    stored = replace(here, cached=replace(cached, in_store=cached.in_store + more))
    kept = replace(here, cached=replace(cached, at_decode=cached.at_decode + more))
    assert costs.split_s(stored) <= costs.split_s(here)
    assert costs.local_s(stored) <= costs.local_s(here)
    assert costs.local_s(kept) <= costs.local_s(here)
    assert costs.split_s(kept) == costs.split_s(here)


@given(st.integers(1, 500), st.integers(0, 600), st.integers(0, 600))
def test_the_last_token_is_always_computed(tokens, in_store, at_decode):
    cached = Cached(in_store, at_decode)
    assert 1 <= cached.left_at_decode(tokens) <= cached.left_at_prefill(tokens) <= tokens


def test_what_the_store_has_makes_the_queue_decide():
    stored = Cached(in_store=48, wanted=48)
    assert decided(running=6, cached=stored) == Decision(False, Why.CHEAPER)
    assert decided(running=4, cached=stored) == Decision(True, Why.CACHED)
    assert decided(tokens=110, most=64, cached=Cached(in_store=96)).is_local


def test_what_the_decode_worker_kept_speaks_for_it():
    kept = Cached(at_decode=48, wanted=48)
    assert decided(running=2, cached=kept) == Decision(True, Why.CACHED)
    assert decided(cached=kept) == Decision(True, Why.CHEAPER)
    assert decided(tokens=110, most=64, cached=Cached(at_decode=96)).is_local


def test_costs_are_learnt_from_the_requests_themselves():
    one = Disaggregation("auto", 100)
    split = one.decide(10, 0, "d")
    assert split == Decision(False, Why.UNMEASURED)
    for _ in range(MIN_MEASURED):
        one.note(split, 10, Timings(prefill_ms=10, kv_write_ms=2, kv_wait_ms=1, kv_read_ms=3))
    local = one.decide(10, 0, "d")
    assert local == Decision(True, Why.CHEAPER)
    for _ in range(20):
        one.note(local, 10, Timings(prefill_ms=40))  # it turns out to be slower there
    assert one.decide(10, 0, "d") == Decision(False, Why.CHEAPER)


def test_who_runs_where_is_counted_while_it_runs():
    one = Disaggregation("auto", 100)
    for _ in range(MIN_MEASURED):
        one.note(Decision(False, Why.UNMEASURED), 10, Timings(prefill_ms=10, kv_read_ms=6))
    one.loads.begin("busy", ("r", 1))
    assert not one.decide(10, 0, "busy").is_local
    assert one.decide(10, 0, "idle").is_local
    one.loads.end("busy", ("r", 1))
    assert one.decide(10, 0, "busy").is_local


def test_a_prompt_in_line_counts_until_it_is_computed():
    one = Disaggregation("auto", 100)
    for _ in range(MIN_MEASURED):
        one.note(Decision(False, Why.UNMEASURED), 10, Timings(prefill_ms=10, kv_read_ms=30))
    one.loads.begin("d", ("r", 1), prompt_tokens=31)
    assert not one.decide(31, 0, "d").is_local
    assert one.decide(31, 0, "idle").is_local
    assert one.decide(30, 0, "d").is_local, "it is shorter, and computed first"
    one.loads.computed(("r", 1))
    assert one.decide(29, 0, "d").is_local, "one sequence runs, and waits for 29 tokens"
    assert not one.decide(31, 0, "d").is_local


@pytest.mark.parametrize(("mode", "name"), [("always", "split/always"), ("never", "local/never")])
def test_fixed_modes_ask_nothing(mode, name):
    assert Disaggregation(mode, 100).decide(1, 1, "d").name == name
