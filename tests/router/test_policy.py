"""Policies are pure functions of a snapshot."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.policy import Candidate, LeastLoaded, fewest_queued_tokens, largest_free_share

CANDIDATES = st.lists(
    st.builds(
        Candidate,
        worker_id=st.text("abc", min_size=1, max_size=3),
        num_blocks=st.integers(10, 12),
        free_blocks=st.integers(0, 10),
        queued_tokens=st.integers(0, 3),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda c: c.worker_id,
)


def test_prefill_goes_to_the_shortest_queue_in_tokens():
    long = Candidate("a", 100, 100, queued_tokens=900)
    short = Candidate("b", 100, 1, queued_tokens=100)
    assert LeastLoaded().pick_prefill([long, short]) is short


def test_decode_goes_to_the_largest_free_share_not_the_largest_number():
    big = Candidate("a", 1000, 200)
    small = Candidate("b", 100, 90)
    assert LeastLoaded().pick_decode([big, small]) is small


@pytest.mark.parametrize("choose", [fewest_queued_tokens, largest_free_share])
def test_ties_go_to_the_smaller_id(choose):
    one = Candidate("w2", 10, 5)
    assert choose([one, replace(one, worker_id="w1")]).worker_id == "w1"


@given(CANDIDATES, st.randoms())
def test_the_order_of_candidates_does_not_matter(candidates, random):
    shuffled = random.sample(candidates, len(candidates))
    assert fewest_queued_tokens(candidates) == fewest_queued_tokens(shuffled)
    assert largest_free_share(candidates) == largest_free_share(shuffled)
