"""What each policy does with a snapshot of workers; a ranking keeps them in order."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.policy import POLICIES, Candidate, KvAware, LeastLoaded, PowerOfTwo, Route, SessionAffinity
from router.prefix_map import MAX_WORKERS, PrefixMap
from router.ranking import SLACK, Ranking
from tandem.config import POLICIES as CONFIGURED

NAMES = st.sampled_from([f"w{number}" for number in range(12)])


class Snapshot:
    """`router.policy.Workers` over plain candidates of one side."""

    def __init__(self, candidates, load="decode_load", needed=1):
        self._candidates = {c.worker_id: c for c in candidates}
        self._load, self._needed = load, needed
        self.names = sorted(self._candidates)

    def fits(self, name):
        return self._candidates[name].free_blocks >= self._needed

    def candidate(self, name):
        return self._candidates[name]

    def least_loaded(self):
        fitting = [name for name in self.names if self.fits(name)]
        return min(fitting, key=lambda name: (getattr(self.candidate(name), self._load), name), default=None)


def fleet(num_workers, free_blocks=100):
    return [Candidate(f"w{number:03}", 100, free_blocks, block_size=16) for number in range(num_workers)]


def test_every_policy_that_can_be_configured_is_there():
    assert tuple(POLICIES) == CONFIGURED


def test_prefill_goes_to_the_shortest_queue_in_tokens():
    long = Candidate("a", 100, 100, queued_tokens=900)
    short = Candidate("b", 100, 1, queued_tokens=100)
    assert LeastLoaded().prefill(Snapshot((long, short), "prefill_load"), Route()) == "b"


def test_decode_goes_to_the_largest_free_share_not_the_largest_number():
    big = Candidate("a", 1000, 200)
    small = Candidate("b", 100, 90)
    assert LeastLoaded().decode(Snapshot((big, small)), Route()) == "b"


# --- power of two ------------------------------------------------------------------------------------


def filled(policy, num_workers, num_requests):
    """How many of the requests, one block each, every worker got."""
    workers = {c.worker_id: replace(c, num_blocks=10**6, free_blocks=10**6) for c in fleet(num_workers)}
    for number in range(num_requests):
        name = policy.decode(Snapshot(workers.values()), Route(f"req-{number}"))
        workers[name] = replace(workers[name], free_blocks=workers[name].free_blocks - 1)
    return [10**6 - worker.free_blocks for worker in workers.values()]


def test_two_choices_keep_the_fullest_worker_near_the_mean():
    """The gap is log2 log n + O(1) however many requests; one choice would be 14 above the mean here."""
    assert max(filled(PowerOfTwo(), 100, 2000)) - 20 <= 4


def test_two_choices_reach_every_worker_and_differ_by_request():
    drawn = {PowerOfTwo().decode(Snapshot(fleet(8)), Route(f"req-{number}")) for number in range(200)}
    assert len(drawn) == 8


def test_of_two_the_less_loaded_is_taken_and_one_worker_is_enough():
    loaded, idle = Candidate("a", 100, 10), Candidate("b", 100, 20)
    for number in range(20):
        assert PowerOfTwo().decode(Snapshot((loaded, idle)), Route(str(number))) == "b"
    assert PowerOfTwo().decode(Snapshot((loaded,)), Route("r")) == "a"
    assert PowerOfTwo().decode(Snapshot(()), Route("r")) is None


# --- cached prefixes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("cached_tokens", "taken"), [(160, "b"), (480, "a")])
def test_a_cached_prefix_is_worth_as_much_load_as_it_has_blocks(cached_tokens, taken):
    """Worker a is 20 blocks fuller than b: ten cached blocks do not make up for it, thirty do."""
    a, b = Candidate("a", 100, 60, block_size=16), Candidate("b", 100, 80, block_size=16)
    assert KvAware().decode(Snapshot((a, b)), Route(cached_tokens={"a": cached_tokens})) == taken


def test_a_full_worker_is_not_taken_for_its_cache():
    a, b = Candidate("a", 100, 0, block_size=16), Candidate("b", 100, 1, block_size=16)
    assert KvAware().decode(Snapshot((a, b)), Route(cached_tokens={"a": 1600, "gone": 1600})) == "b"


@given(st.lists(st.integers(0, 3), max_size=20), st.lists(st.integers(0, 3), max_size=20), st.integers(1, 4))
def test_the_map_finds_the_longest_common_beginning_in_whole_pieces(one, other, piece):
    prefixes = PrefixMap(piece)
    prefixes.note(prefixes.beginnings("t", one), "w")
    common = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    length = min(len(one), len(other)) if common is None else common
    whole = length // piece * piece
    found = prefixes.cached_tokens(prefixes.beginnings("t", other))
    assert found == ({"w": whole} if whole else {})
    assert prefixes.cached_tokens(prefixes.beginnings("another tenant", other)) == {}


def test_the_map_is_bounded_and_forgets_longer_beginnings_first():
    prefixes = PrefixMap(1, max_beginnings=3)
    prompt = prefixes.beginnings("", [1, 2, 3, 4, 5])
    prefixes.note(prompt, "w")
    assert len(prefixes) == 3
    assert prefixes.cached_tokens(prompt) == {"w": 3}
    for number in range(MAX_WORKERS + 2):
        prefixes.note(prompt[:1], f"w{number}")
    assert len(prefixes.cached_tokens(prompt[:1])) == MAX_WORKERS


# --- sessions ----------------------------------------------------------------------------------------


def homes(workers, num_sessions=1000):
    snapshot = Snapshot(workers)
    sessions = [f"session-{number}" for number in range(num_sessions)]
    return {session: SessionAffinity().decode(snapshot, Route(session=session)) for session in sessions}


def test_sessions_spread_evenly():
    """1000 sessions on 10 workers: each has 100 but for chance (5 standard deviations: 48)."""
    counts = Counter(homes(fleet(10)).values())
    assert len(counts) == 10
    assert all(abs(count - 100) < 48 for count in counts.values())


def test_a_worker_that_joins_or_leaves_moves_only_its_own_sessions():
    workers = fleet(10)
    before, after = homes(workers[:9]), homes(workers)
    moved = {session for session, home in after.items() if home != before[session]}
    assert {after[session] for session in moved} == {workers[9].worker_id}
    assert 50 < len(moved) < 150, "a tenth of them"


def test_a_session_whose_worker_is_full_goes_to_the_least_loaded():
    workers = fleet(10, free_blocks=50)
    home = SessionAffinity().decode(Snapshot(workers), Route(session="s"))
    full = [replace(w, free_blocks=0) if w.worker_id == home else w for w in workers]
    full[0] = full[0] if full[0].worker_id == home else replace(full[0], free_blocks=60)
    assert SessionAffinity().decode(Snapshot(full), Route(session="s")) == Snapshot(full).least_loaded()


def test_requests_of_no_session_go_to_the_least_loaded():
    workers = [*fleet(10), Candidate("z", 100, 99), Candidate("y", 1000, 1000)]
    assert SessionAffinity().decode(Snapshot(workers), Route("r")) == Snapshot(workers).least_loaded()


# --- the ranking -------------------------------------------------------------------------------------


@given(st.lists(st.tuples(NAMES, st.one_of(st.none(), st.integers(0, 4))), max_size=300), st.sets(NAMES))
def test_a_ranking_gives_the_least_key_that_is_accepted(changes, rejected):
    """None removes a name; ties go to the smaller one."""
    ranking, keys = Ranking(), {}
    for name, key in changes:
        if key is None:
            ranking.remove(name)
            keys.pop(name, None)
        else:
            ranking.put(name, key)
            keys[name] = key
        assert (name in ranking) == (key is not None)
        left = [(key, name) for name, key in keys.items() if name not in rejected]
        assert ranking.first(lambda name: name not in rejected) == (min(left)[1] if left else None)
        assert ranking.first() == (min((k, n) for n, k in keys.items())[1] if keys else None)


def test_outdated_entries_do_not_pile_up():
    ranking = Ranking()
    for number in range(10_000):
        ranking.put(f"w{number % 5}", number % 97)
    assert len(ranking._heap) <= 2 * 5 + SLACK
