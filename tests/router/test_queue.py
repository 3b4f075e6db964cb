"""The promises of `router.queue`: order, no head-of-line blocking, no starvation, conservation, cost."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.queue import MAX_PRIORITY, RequestQueue
from router.size_bucket import Entry
from tandem.errors import AlreadyExists, Overloaded
from tests.clock import ManualClock

AGING_S = 5.0


@dataclass(frozen=True)
class Waiting:
    request_id: str
    priority: int = 0
    deadline_s: float = math.inf
    tenant: str = ""


@pytest.fixture
def clock():
    return ManualClock()


def make_queue(clock, max_length=1 << 20, **options) -> RequestQueue[Waiting]:
    return RequestQueue(max_length, AGING_S, clock, **options)


def fits(limit):
    return lambda entry: entry.need <= limit


def anything(entry) -> bool:
    return True


def drain(queue) -> list[str]:
    found = []
    while entry := queue.constrained_get(anything):
        found.append(entry.request.request_id)
    return found


# --- order ---------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(1, 100)), max_size=40))
def test_higher_priority_goes_first_then_age(waiting):
    queue = make_queue(ManualClock())
    for number, (priority, need) in enumerate(waiting):
        queue.put(Waiting(str(number), priority), need)
    expected = sorted(range(len(waiting)), key=lambda i: (-waiting[i][0], i))
    assert drain(queue) == [str(number) for number in expected]


@pytest.mark.parametrize(("head_start_s", "first"), [(2 * AGING_S - 0.1, "high"), (2 * AGING_S + 0.1, "low")])
def test_waiting_aging_s_is_worth_one_step_of_priority(clock, head_start_s, first):
    queue = make_queue(clock)
    queue.put(Waiting("low", priority=0), 1)
    clock.advance(head_start_s)
    queue.put(Waiting("high", priority=2), 1)
    assert drain(queue)[0] == first


def test_an_extreme_priority_is_worth_no_more_than_the_limit(clock):
    queue = make_queue(clock)
    queue.put(Waiting("patient"), 1)
    clock.advance(MAX_PRIORITY * AGING_S + 0.1)
    queue.put(Waiting("pushy", priority=2**31 - 1), 1)
    assert drain(queue) == ["patient", "pushy"]


# --- what does not fit stops nobody ----------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 2000), st.integers(-2, 2)), min_size=1, max_size=60),
    st.integers(0, 2000),
)
def test_if_anything_fits_something_is_returned(waiting, limit):
    queue = make_queue(ManualClock())
    for number, (need, priority) in enumerate(waiting):
        queue.put(Waiting(str(number), priority), need)
    left = sorted(need for need, _ in waiting)
    while entry := queue.constrained_get(fits(limit)):
        assert entry.need <= limit
        left.remove(entry.need)
    assert not [need for need in left if need <= limit]
    assert len(queue) == len(left)


def test_a_small_request_passes_a_big_one_of_its_own_size_class(clock):
    queue = make_queue(clock)
    queue.put(Waiting("big"), 15)
    queue.put(Waiting("middle"), 12)
    queue.put(Waiting("small"), 9)
    entry = queue.constrained_get(fits(10))
    assert entry is not None
    assert entry.request.request_id == "small"


def test_the_entry_the_condition_said_yes_to_is_the_one_returned(clock):
    queue = make_queue(clock)
    for number in range(20):
        queue.put(Waiting(str(number)), number)
    accepted = []

    def take(entry) -> bool:
        if entry.need == 7:
            accepted.append(entry)
        return entry.need == 7

    # 4 and then 5 are first of the bucket that holds 7; the queue offers 7 once it is first itself.
    assert queue.constrained_get(take) is None
    for name in ("4", "5", "6"):
        queue.remove(name)
    assert queue.constrained_get(take) is accepted[-1]


def test_a_condition_that_raises_changes_nothing(clock):
    queue = make_queue(clock)
    queue.put(Waiting("a"), 1)
    with pytest.raises(ZeroDivisionError):
        queue.constrained_get(lambda entry: bool(1 // 0))
    assert drain(queue) == ["a"]


# --- nor is it passed for ever ------------------------------------------------------------------


RUN_S = 3.0


def wait_of_a_big_request(starvation_s: float, gap_s: float, num_others: int = 0) -> float | None:
    """How long a request for all 100 blocks waits when one for 10 blocks comes every `gap_s` and runs
    `RUN_S`, so that the pool is never empty by itself; None if it waits for more than a minute. The small
    ones are of the same tenant, or of so many others."""
    clock = ManualClock()
    queue = make_queue(clock, starvation_s=starvation_s)
    free, running = 100, deque()
    for number in range(int(60 / gap_s)):
        while running and running[0][0] <= clock():
            free += running.popleft()[1]
        tenant = str(number % num_others) if num_others else ""
        queue.put(Waiting(f"small-{number}", tenant=tenant), 10)
        if number == 1:
            big = queue.put(Waiting("big"), 100)
        while entry := queue.constrained_get(fits(free)):
            free -= entry.need
            running.append((clock() + RUN_S, entry.need))
            if entry.need == 100:
                return clock() - big.put_s
        clock.advance(gap_s)
    return None


@pytest.mark.parametrize("num_others", [0, 1, 7])
@pytest.mark.parametrize("gap_s", [0.1, 0.25, 1.0])
def test_a_big_request_waits_no_longer_than_the_bound_and_one_drain(gap_s, num_others):
    assert wait_of_a_big_request(math.inf, gap_s, num_others) is None, "it would starve without the rule"
    waited_s = wait_of_a_big_request(4.0, gap_s, num_others)
    assert waited_s is not None
    assert waited_s <= 4.0 + RUN_S + 3 * gap_s


def test_every_big_request_of_a_class_shares_the_clock(clock):
    """The second big one does not wait another `starvation_s` after the first: it was passed as well."""
    queue = make_queue(clock, starvation_s=4.0)
    for number in range(5):
        queue.put(Waiting(f"big-{number}"), 90 + number)
    clock.advance(0.1)
    queue.put(Waiting("small"), 1)
    assert queue.constrained_get(fits(10)) is not None
    clock.advance(4.1)
    queue.put(Waiting("late"), 1)
    assert queue.constrained_get(fits(10)) is None
    assert drain(queue) == ["big-0", "big-1", "big-2", "big-3", "big-4", "late"]


def test_a_later_passing_counts_for_those_behind_the_first_too(clock):
    queue = make_queue(clock, starvation_s=4.0)
    for name, need in [("big-0", 90), ("small-0", 1), ("big-1", 91)]:
        queue.put(Waiting(name), need)
        clock.advance(0.1)
    assert queue.constrained_get(fits(10)) is not None  # passes big-0 only
    queue.put(Waiting("small-1"), 1)
    assert queue.constrained_get(fits(10)) is not None  # passes both
    clock.advance(4.1)
    queue.put(Waiting("late"), 1)
    assert queue.constrained_get(fits(90)) is not None
    assert queue.constrained_get(fits(10)) is None
    assert drain(queue) == ["big-1", "late"]


def test_an_entry_that_came_after_the_passing_was_not_passed(clock):
    queue = make_queue(clock, starvation_s=4.0)
    queue.put(Waiting("big"), 100)
    queue.put(Waiting("small"), 1)
    assert queue.constrained_get(fits(10)) is not None
    clock.advance(4.1)
    queue.put(Waiting("urgent and big", priority=5), 100)
    queue.put(Waiting("late"), 1)
    queue.remove("big")
    entry = queue.constrained_get(fits(10))
    assert entry is not None
    assert entry.request.request_id == "late"


def test_what_ranks_before_a_starving_entry_still_goes(clock):
    queue = make_queue(clock, starvation_s=4.0)
    queue.put(Waiting("big"), 100)
    clock.advance(0.1)
    queue.put(Waiting("small"), 1)
    assert queue.constrained_get(fits(10)) is not None
    clock.advance(4.1)
    queue.put(Waiting("urgent", priority=5), 1)
    queue.put(Waiting("late"), 1)
    entry = queue.constrained_get(fits(10))
    assert entry is not None
    assert entry.request.request_id == "urgent"
    assert queue.constrained_get(fits(10)) is None


def test_an_entry_that_no_worker_can_hold_any_more_holds_up_nobody(clock):
    queue = make_queue(clock, starvation_s=4.0, can_ever_fit=lambda entry: entry.need <= 50)
    queue.put(Waiting("big"), 100)
    for number in range(3):
        queue.put(Waiting(f"small-{number}"), 1)
        assert queue.constrained_get(fits(50)) is not None
        clock.advance(10.0)
    assert "big" in queue


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(-2, 2), st.floats(0, 2)), max_size=80))
def test_nobody_is_passed_for_longer_than_the_bound(arrivals):
    """Whatever fits or not, an entry is passed for at most `starvation_s` once it is first of its class."""
    clock = ManualClock()
    queue = make_queue(clock, starvation_s=3.0)
    first_passed_s: dict[str, float] = {}
    waiting: dict[str, Entry[Waiting]] = {}
    for number, (need, priority, pause_s) in enumerate(arrivals):
        waiting[str(number)] = queue.put(Waiting(str(number), priority), need)
        clock.advance(pause_s)
        entry = queue.constrained_get(fits(16))
        if entry is None:
            continue
        del waiting[entry.request.request_id]
        for name, other in waiting.items():
            is_first = all(
                other.rank <= o.rank
                for o in waiting.values()
                if o.need.bit_length() == other.need.bit_length()
            )
            if other.rank < entry.rank and is_first:
                since_s = first_passed_s.setdefault(name, clock())
                assert clock() - since_s <= 3.0


# --- conservation --------------------------------------------------------------------------------


ACTIONS = st.one_of(
    st.tuples(
        st.just("put"), st.integers(0, 70), st.integers(-2, 2), st.floats(0.1, 9), st.sampled_from("abc")
    ),
    st.tuples(st.just("get"), st.integers(0, 70)),
    st.tuples(st.just("put_back"), st.integers(0, 30)),
    st.tuples(st.just("remove"), st.integers(0, 30)),
    st.tuples(st.just("wait"), st.floats(0, 4)),
)


@given(st.lists(ACTIONS, max_size=120))
def test_everything_put_comes_out_exactly_once(actions):
    clock = ManualClock()
    queue = make_queue(clock, starvation_s=2.0)
    inside: dict[str, Entry[Waiting]] = {}
    outside: list[Entry[Waiting]] = []
    for number, (action, *values) in enumerate(actions):
        if action == "put":
            need, priority, timeout_s, tenant = values
            request = Waiting(str(number), priority, clock() + timeout_s, tenant)
            inside[str(number)] = queue.put(request, need)
        elif action == "put_back" and values[0] < len(outside):
            entry = outside.pop(values[0])
            again = queue.put(entry.request, entry.need, since_s=entry.put_s)
            inside[entry.request.request_id] = again
        elif action == "get" and (entry := queue.constrained_get(fits(values[0]))):
            outside.append(inside.pop(entry.request.request_id))
        elif action == "remove":
            name = str(values[0])
            assert queue.remove(name) is inside.pop(name, None)
        elif action == "wait":
            clock.advance(values[0])
            late = {name for name, e in inside.items() if e.request.deadline_s <= clock()}
            assert {e.request.request_id for e in queue.expired()} == late
            for name in late:
                del inside[name]
        assert_agrees(queue, inside, clock)
    assert sorted(drain(queue)) == sorted(inside)


def assert_agrees(queue, inside, clock) -> None:
    snapshot = queue.snapshot()
    assert len(queue) == snapshot.length == len(inside) == sum(snapshot.waiting.values())
    oldest = max((clock() - e.put_s for e in inside.values()), default=0.0)
    assert snapshot.oldest_wait_s == oldest
    assert queue.next_deadline_s() == min((e.request.deadline_s for e in inside.values()), default=None)


def test_removing_twice_or_something_unknown_returns_none(clock):
    queue = make_queue(clock)
    queue.put(Waiting("a"), 1)
    assert queue.remove("a") is not None
    assert queue.remove("a") is None
    assert queue.remove("never") is None


def test_a_name_may_wait_only_once_but_again_later(clock):
    queue = make_queue(clock)
    queue.put(Waiting("a"), 1)
    with pytest.raises(AlreadyExists, match="ID_IN_USE"):
        queue.put(Waiting("a"), 1)
    queue.remove("a")
    queue.put(Waiting("a"), 200)
    assert queue.constrained_get(fits(100)) is None  # the removed one does not come back to life
    assert drain(queue) == ["a"]


def test_what_comes_back_takes_its_old_place_even_when_full(clock):
    queue = make_queue(clock, max_length=2)
    queue.put(Waiting("first"), 1)
    clock.advance(1.0)
    queue.put(Waiting("second"), 1)
    entry = queue.constrained_get(anything)
    assert entry is not None
    queue.put(Waiting("third"), 1)
    queue.put(entry.request, entry.need, since_s=entry.put_s)
    assert len(queue) == 3
    assert queue.snapshot().oldest_wait_s == 1.0
    assert drain(queue) == ["first", "second", "third"]


# --- the bound, and its hint -----------------------------------------------------------------------


def test_a_full_queue_refuses_with_a_hint_from_the_drain_rate(clock):
    queue = make_queue(clock, max_length=20)
    for number in range(20):
        queue.put(Waiting(str(number)), 1)
    for number in range(100, 150):
        clock.advance(0.1)
        queue.constrained_get(anything)
        queue.put(Waiting(str(number)), 1)
    with pytest.raises(Overloaded) as caught:
        queue.put(Waiting("late"), 1)
    error = caught.value
    assert error.reason == "QUEUE_FULL"
    assert error.retry_after_ms == pytest.approx(2000, rel=0.01)
    assert error.message == f"server is full; retry in {error.retry_after_ms} ms"
    assert "late" not in queue


def test_the_hint_is_clamped_and_grows_while_nothing_moves(clock):
    queue = make_queue(clock, max_length=4)
    for number in range(4):
        queue.put(Waiting(str(number)), 1)
    assert queue.retry_after_ms() == 50
    clock.advance(2.0)
    assert queue.retry_after_ms() == 8000
    clock.advance(3600.0)
    assert queue.retry_after_ms() == 30_000


def test_idle_time_does_not_count_as_slow_draining(clock):
    queue = make_queue(clock)
    for number in range(50):
        queue.put(Waiting(str(number)), 1)
        clock.advance(0.01)
        queue.constrained_get(anything)
        clock.advance(600.0)
    for number in range(100):
        queue.put(Waiting(f"again-{number}"), 1)
    assert queue.retry_after_ms() == pytest.approx(1000, rel=0.01)


# --- cost ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tenants", [1, 1_000])
@pytest.mark.parametrize("length", [100, 1_000, 20_000])
def test_a_get_asks_the_same_few_questions_however_long_the_queue(clock, length, num_tenants):
    queue = make_queue(clock)
    for number in range(length):
        waiting = Waiting(str(number), priority=number % 3, tenant=str(number % num_tenants))
        queue.put(waiting, 64 + number * 37 % 960)
    asked = 0

    def refuse(entry) -> bool:
        nonlocal asked
        asked += 1
        return False

    assert queue.constrained_get(refuse) is None
    assert asked <= 8  # needs of 64 to 1023 make four buckets, two offers each


def test_entries_removed_behind_a_blocked_head_leave_no_debris(clock):
    queue = make_queue(clock)
    queue.put(Waiting("head"), 40)
    for number in range(5_000):
        clock.advance(0.001)
        queue.put(Waiting(str(number), deadline_s=1e9), 41)
        queue.remove(str(number))
    bucket = queue._buckets[6]
    heaps = (queue._by_age, queue._by_deadline, bucket._by_turn._lines[""], bucket._by_need)
    assert len(bucket._by_turn._heads) <= 65
    assert max(len(heap._heap) for heap in heaps) <= 65
