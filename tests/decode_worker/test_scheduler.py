"""Continuous batching: order, the limit, and leaving at any time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode_worker.scheduler import DecodeScheduler


class Item:
    """All that the scheduler needs of a sequence: its identity."""


def make(max_batch: int, count: int) -> tuple[DecodeScheduler, list[Item]]:
    scheduler, items = DecodeScheduler(max_batch), [Item() for _ in range(count)]
    for item in items:
        scheduler.join(item)
    return scheduler, items


def test_nobody_runs_at_first():
    scheduler, _ = make(4, 0)
    assert scheduler.schedule() == []
    assert scheduler.num_running == scheduler.num_waiting == 0


@pytest.mark.parametrize(("max_batch", "count"), [(1, 3), (3, 3), (4, 3)])
def test_the_oldest_run_and_the_rest_wait(max_batch, count):
    scheduler, items = make(max_batch, count)
    assert scheduler.schedule() == items[:max_batch]
    assert scheduler.num_running == min(max_batch, count)
    assert scheduler.num_waiting == count - scheduler.num_running


def test_a_place_is_taken_in_the_next_step():
    scheduler, items = make(2, 4)
    scheduler.schedule()
    assert scheduler.leave(lambda item: item is items[0]) == [items[0]]
    assert scheduler.schedule() == items[1:3]


def test_those_who_wait_may_leave_too():
    scheduler, items = make(1, 3)
    scheduler.schedule()
    assert scheduler.leave(lambda item: item is items[1]) == [items[1]]
    scheduler.leave(lambda item: item is items[0])
    assert scheduler.schedule() == [items[2]]


def test_a_running_sequence_is_not_moved_by_newcomers():
    scheduler, items = make(2, 2)
    first = scheduler.schedule()
    scheduler.join(Item())
    assert scheduler.schedule() == first == items


def test_the_batch_is_the_callers_to_keep():
    scheduler, items = make(2, 2)
    batch = scheduler.schedule()
    scheduler.leave(lambda item: True)
    assert batch == items


@given(st.integers(1, 5), st.lists(st.tuples(st.sampled_from(["join", "step", "leave"]), st.integers(0, 9))))
def test_first_come_first_served_never_more_than_allowed(max_batch, moves):
    scheduler, present = DecodeScheduler(max_batch), []
    for move, index in moves:
        if move == "join":
            present.append(Item())
            scheduler.join(present[-1])
        elif move == "leave" and present:
            gone = present.pop(index % len(present))
            assert scheduler.leave(lambda item, gone=gone: item is gone) == [gone]
        else:
            batch = scheduler.schedule()
            assert batch == present[:max_batch]
        assert scheduler.num_running <= max_batch
        assert scheduler.num_running + scheduler.num_waiting == len(present)
