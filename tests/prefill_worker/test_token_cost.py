"""The cost of a prompt token is what grows with the prompt, not what every forward costs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefill_worker.token_cost import TokenCost


@given(
    sizes=st.lists(st.integers(1, 4096), min_size=2, max_size=200),
    per_token_s=st.floats(1e-6, 1e-2),
    fixed_s=st.floats(0, 1e-2),
)
def test_the_slope_is_found_whatever_a_forward_costs_besides(sizes, per_token_s, fixed_s):
    cost = TokenCost()
    for size in sizes:
        cost.observe(size, fixed_s + size * per_token_s)
    if max(sizes) > 2 * min(sizes):
        assert cost.per_token_s == pytest.approx(per_token_s, rel=0.05, abs=1e-7)


def test_forwards_of_one_size_give_their_mean_and_none_give_nothing():
    cost = TokenCost()
    assert cost.per_token_s == 0
    for seconds in (0.1, 0.3):
        cost.observe(100, seconds)
    assert cost.per_token_s == pytest.approx(0.002, rel=0.01)


def test_it_follows_a_machine_that_became_slower():
    cost = TokenCost()
    for factor in (1, 3):
        for _ in range(300):
            for size in (64, 512):
                cost.observe(size, factor * 1e-3 * size)
    assert cost.per_token_s == pytest.approx(3e-3, rel=0.02)


def test_noise_never_makes_a_token_cost_less_than_nothing():
    cost = TokenCost()
    cost.observe(10, 0.9)
    cost.observe(1000, 0.1)
    assert cost.per_token_s == 0
