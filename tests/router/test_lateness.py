"""Late tokens are counted over the last seconds, and what is longer ago is forgotten."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.lateness import SAMPLE_S, LateShare


def test_the_share_is_that_of_the_window():
    share = LateShare(window_s=10.0)
    assert share.value == 0
    share.sample(100.0, 50, 50)
    assert share.value == 1
    for second in range(1, 31):
        share.sample(100.0 + second, 50 + 10 * second, 50 + second)
    assert share.value == pytest.approx(0.1), "the bad beginning is forgotten"
    for second in range(31, 50):
        share.sample(100.0 + second, 350, 80)
    assert share.value == 0, "nothing came, so nothing came late"


@given(st.lists(st.tuples(st.floats(0.0, 3.0), st.integers(0, 50), st.integers(0, 50)), max_size=60))
def test_it_is_a_share_and_keeps_no_more_than_a_window(steps):
    share, now_s, num_gaps, num_late = LateShare(window_s=5.0), 0.0, 0, 0
    for passed_s, gaps, late in steps:
        now_s, num_gaps, num_late = now_s + passed_s, num_gaps + gaps, num_late + min(gaps, late)
        share.sample(now_s, num_gaps, num_late)
        assert 0 <= share.value <= 1
    assert len(share._samples) <= 5.0 / SAMPLE_S + 2
