"""The cost of a prompt token is what grows with the prompt; small forwards hardly count."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.token_cost import TokenCost


@given(
    sizes=st.lists(st.integers(1, 4096), min_size=1, max_size=200),
    per_token_s=st.floats(1e-6, 1e-2),
    fixed_s=st.floats(0, 1e-2),
)
def test_it_lies_between_the_cost_of_a_token_and_that_in_the_smallest_forward(sizes, per_token_s, fixed_s):
    cost = TokenCost()
    assert cost.per_token_s == 0
    for size in sizes:
        cost.observe(size, fixed_s + size * per_token_s)
    most = per_token_s + fixed_s / min(sizes)
    assert per_token_s * (1 - 1e-9) <= cost.per_token_s <= most * (1 + 1e-9)


def test_what_a_forward_costs_besides_its_tokens_is_left_out():
    """Many short rests of restored prompts beside a few whole ones."""
    cost = TokenCost()
    for size in [16] * 50 + [1024] * 3:
        cost.observe(size, 4e-3 + 5e-4 * size)
    assert cost.per_token_s == pytest.approx(5e-4, rel=0.02)


def test_it_follows_a_machine_that_became_slower():
    cost = TokenCost()
    for factor in (1, 3):
        for _ in range(300):
            for size in (64, 512):
                cost.observe(size, factor * 1e-3 * size)
    assert cost.per_token_s == pytest.approx(3e-3, rel=0.02)


def test_tokens_that_a_time_allows():
    cost = TokenCost()
    assert cost.tokens_within(0.1, 16, 64) == 64  # nobody knows better
    cost.observe(100, 0.4)
    assert cost.tokens_within(0.1, 16, 64) == 25
    assert cost.tokens_within(0.01, 16, 64) == 16
    assert cost.tokens_within(1.0, 16, 64) == 64
    assert cost.tokens_within(0.01, 128, 64) == 64  # the most is the most


def test_fewer_cores_take_longer():
    """A worker that shares its cores has all of them in one forward and half of them in the next."""
    cost = TokenCost()
    cost.num_cores = 2
    cost.observe(100, 0.1)
    cost.num_cores = 1
    assert cost.per_token_s == pytest.approx(2e-3)  # not seen yet
    cost.observe(100, 0.15)
    assert cost.per_token_s == pytest.approx(1.5e-3)
    cost.num_cores = 2
    assert cost.per_token_s == pytest.approx(1e-3)
