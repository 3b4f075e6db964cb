"""Which side is short: figures first, then what must hold for all of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.balance import Advice, Demand, Targets, advise, decode_wanted, prefill_wanted

IDLE = Demand(
    num_prefill=2, num_decode=2, queued_tokens=0, decode_blocks=200, reserved_blocks=0, waiting_blocks=0
)
TARGETS = Targets(queued_tokens=1000, occupancy=0.8, late_share=0.1)

demands = st.builds(
    Demand,
    num_prefill=st.integers(0, 50),
    num_decode=st.integers(0, 50),
    queued_tokens=st.integers(0, 10**7),
    decode_blocks=st.integers(0, 10**6),
    reserved_blocks=st.integers(0, 10**6),
    waiting_blocks=st.integers(0, 10**6),
    late_share=st.floats(0, 1),
)


def test_a_worker_is_wanted_for_each_target_of_work():
    assert prefill_wanted(replace(IDLE, queued_tokens=3000), TARGETS) == 3
    assert decode_wanted(replace(IDLE, reserved_blocks=80), TARGETS) == pytest.approx(1)
    assert decode_wanted(replace(IDLE, reserved_blocks=160, waiting_blocks=160), TARGETS) == pytest.approx(4)


def test_late_tokens_want_workers_though_memory_is_free():
    """In proportion to the target, and at most half as many again at a time."""
    assert decode_wanted(replace(IDLE, late_share=0.12), TARGETS) == pytest.approx(2.4)
    assert decode_wanted(replace(IDLE, late_share=0.9), TARGETS) == pytest.approx(3)
    assert decode_wanted(replace(IDLE, late_share=0.12, reserved_blocks=400), TARGETS) == pytest.approx(5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, Advice.BALANCED),
        ({"queued_tokens": 2000, "reserved_blocks": 160}, Advice.BALANCED),
        ({"queued_tokens": 2001}, Advice.PREFILL),
        ({"reserved_blocks": 161}, Advice.DECODE),
        ({"queued_tokens": 9000, "reserved_blocks": 200}, Advice.PREFILL),
        ({"queued_tokens": 2500, "reserved_blocks": 200, "waiting_blocks": 300}, Advice.DECODE),
        ({"late_share": 0.1}, Advice.BALANCED),
        ({"late_share": 0.11}, Advice.DECODE),
        ({"late_share": 0.11, "queued_tokens": 9000}, Advice.PREFILL),
        ({"num_prefill": 0, "queued_tokens": 1001}, Advice.PREFILL),
    ],
)
def test_the_side_with_most_to_do_is_named(change, says):
    assert advise(replace(IDLE, **change), TARGETS) is says


@given(demands, st.integers(1, 10**6))
def test_more_work_never_wants_fewer_workers(demand, more):
    assert prefill_wanted(
        replace(demand, queued_tokens=demand.queued_tokens + more), TARGETS
    ) > prefill_wanted(demand, TARGETS)
    assert decode_wanted(
        replace(demand, late_share=min(1, demand.late_share + more / 10**6)), TARGETS
    ) >= decode_wanted(demand, TARGETS)
    assert decode_wanted(
        replace(demand, waiting_blocks=demand.waiting_blocks + more), TARGETS
    ) >= decode_wanted(demand, TARGETS)


@given(demands)
def test_as_many_workers_as_are_wanted_is_balance(demand):
    """Adding workers of the same size, and following the figures once, ends the shortage."""
    sizes = demand.decode_blocks / demand.num_decode if demand.num_decode else 0
    num_prefill = max(demand.num_prefill, prefill_wanted(demand, TARGETS))
    num_decode = max(demand.num_decode, 1.0001 * decode_wanted(demand, TARGETS))
    grown = replace(
        demand,
        num_prefill=num_prefill,
        num_decode=num_decode,
        decode_blocks=sizes * num_decode,
        late_share=min(demand.late_share, TARGETS.late_share),
    )
    assert advise(grown, TARGETS) is Advice.BALANCED
