"""Policies rank workers by what each has in hand; a ranking keeps them in order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.policy import Candidate, LeastLoaded
from router.ranking import SLACK, Ranking

NAMES = st.sampled_from([f"w{number}" for number in range(12)])


def test_prefill_goes_to_the_shortest_queue_in_tokens():
    long = Candidate("a", 100, 100, queued_tokens=900)
    short = Candidate("b", 100, 1, queued_tokens=100)
    assert min((long, short), key=LeastLoaded().prefill_key) is short


def test_decode_goes_to_the_largest_free_share_not_the_largest_number():
    big = Candidate("a", 1000, 200)
    small = Candidate("b", 100, 90)
    assert min((big, small), key=LeastLoaded().decode_key) is small


@given(st.lists(st.tuples(NAMES, st.one_of(st.none(), st.integers(0, 4))), max_size=300), st.sets(NAMES))
def test_a_ranking_gives_the_least_key_that_is_accepted(changes, rejected):
    """None removes a name; ties go to the smaller one."""
    ranking, keys = Ranking(), {}
    for name, key in changes:
        if key is None:
            ranking.remove(name)
            keys.pop(name, None)
        else:
            ranking.put(name, (key,))
            keys[name] = key
        left = [(key, name) for name, key in keys.items() if name not in rejected]
        assert ranking.first(lambda name: name not in rejected) == (min(left)[1] if left else None)
        assert ranking.first() == (min((k, n) for n, k in keys.items())[1] if keys else None)


def test_outdated_entries_do_not_pile_up():
    ranking = Ranking()
    for number in range(10_000):
        ranking.put(f"w{number % 5}", (number % 97,))
    assert len(ranking._heap) <= 2 * 5 + SLACK
