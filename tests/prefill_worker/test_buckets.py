"""Which prompts go together: bounds of a batch, nobody left behind, and how long anybody waits."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefill_worker.buckets import HURRY, MAX_OVERTAKEN, LengthBuckets
from prefill_worker.job import PrefillJob
from tandem.config import PrefillConfig
from tandem.sampling import SamplingParams
from tandem.work import Work

WAIT_S = 0.004
LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=40)
CONFIGS = st.builds(
    PrefillConfig,
    token_budget=st.integers(1, 600),
    bucket_tolerance=st.floats(0, 1),
    max_batch=st.integers(1, 8),
)


def make_job(length: int, arrived_s: float = 0.0, deadline_s: float = 1e9) -> PrefillJob:
    work = Work(
        request_id="r",
        epoch=0,
        token_ids=(1,) * length,
        num_prompt_tokens=length,
        sampling=SamplingParams(max_tokens=1, seed=0),
        deadline_s=deadline_s,
        fingerprint=b"",
    )
    return PrefillJob(work, lambda event: None, arrived_s=arrived_s)


def make_buckets(lengths=(), config=None) -> tuple[LengthBuckets, list[PrefillJob]]:
    buckets = LengthBuckets(config or PrefillConfig(max_wait_s=WAIT_S))
    jobs = [make_job(length) for length in lengths]
    for job in jobs:
        buckets.add(job)
    return buckets, jobs


def anything(job) -> bool:
    return True


def lengths_of(batch) -> list[int]:
    return [job.num_tokens for job in batch]


# --- what a batch may be --------------------------------------------------------------------------


@given(LENGTHS, CONFIGS, st.data())
def test_no_batch_exceeds_its_bounds_and_everybody_leaves_once(lengths, config, data):
    buckets, jobs = make_buckets(lengths, config)
    left = []
    while len(buckets):
        has_memory = data.draw(st.sets(st.sampled_from(list(buckets)), min_size=1))
        batch = buckets.next_batch(has_memory.__contains__)
        assert batch, "somebody had memory"
        longest, shortest = max(lengths_of(batch)), min(lengths_of(batch))
        assert set(batch) <= has_memory
        assert len(batch) == 1 or len(batch) <= config.max_batch
        assert len(batch) == 1 or longest * len(batch) <= config.token_budget
        assert shortest >= (1 - config.bucket_tolerance) * longest
        left += batch
    assert sorted(map(id, left)) == sorted(map(id, jobs))


@given(LENGTHS, CONFIGS)
def test_the_oldest_prompt_is_in_every_batch(lengths, config):
    buckets, _ = make_buckets(lengths, config)
    while len(buckets):
        oldest = next(iter(buckets))
        assert oldest in buckets.next_batch(anything)


def test_similar_prompts_join_whatever_their_place_in_line():
    buckets, _ = make_buckets([100, 10, 90, 11, 110])
    assert lengths_of(buckets.next_batch(anything)) == [100, 90, 110]
    assert lengths_of(buckets.next_batch(anything)) == [10, 11]


def test_a_neighbour_that_does_not_fit_does_not_hide_one_that_does():
    buckets, _ = make_buckets([100, 110, 85], PrefillConfig(token_budget=210))
    assert lengths_of(buckets.next_batch(anything)) == [100, 85]


def test_a_prompt_longer_than_the_budget_goes_alone():
    buckets, _ = make_buckets([200, 200, 10], PrefillConfig(token_budget=100, bucket_tolerance=1.0))
    assert lengths_of(buckets.next_batch(anything)) == [200]


# --- memory ---------------------------------------------------------------------------------------


def test_a_prompt_without_memory_stops_nobody():
    buckets, (big, *_) = make_buckets([300, 20, 20])
    batch = buckets.next_batch(lambda job: job is not big)
    assert lengths_of(batch) == [20, 20]
    assert list(buckets) == [big]


def test_a_member_without_memory_stays_behind():
    buckets, jobs = make_buckets([20, 20, 20])
    assert buckets.next_batch(lambda job: job is not jobs[1]) == [jobs[0], jobs[2]]
    assert list(buckets) == [jobs[1]]


def test_without_memory_nothing_is_taken():
    buckets, jobs = make_buckets([20, 30])
    assert buckets.next_batch(lambda job: False) == []
    assert list(buckets) == jobs


@given(st.integers(2, 20), st.integers(1, 5))
def test_small_prompts_do_not_take_a_large_ones_memory_for_ever(need, stay):
    """`need` blocks never come together while one-block prompts keep arriving and stay for `stay` steps."""
    total, clock = need, itertools.count()
    buckets, (large,) = make_buckets([need * 16])
    running: list[tuple[int, int]] = []  # (leaves at, blocks)

    def start(job) -> bool:
        blocks = job.num_tokens // 16
        fits = blocks + sum(held for _, held in running) <= total
        if fits:
            running.append((now + stay, blocks))
        return fits

    running.append((stay, 1))
    for now in clock:
        running = [(leaves, blocks) for leaves, blocks in running if leaves > now]
        for _ in range(total):
            buckets.add(make_job(16))
        if large in buckets.next_batch(start):
            break
        assert now <= MAX_OVERTAKEN + stay + 1


def test_can_start_any_asks_only_those_who_may_start():
    buckets, (large, small) = make_buckets([320, 16])
    for _ in range(MAX_OVERTAKEN):
        assert buckets.can_start_any(lambda job: job is small)
        buckets.next_batch(lambda job: job is small)
        buckets.add(small)
    assert not buckets.can_start_any(lambda job: job is small)
    assert buckets.next_batch(lambda job: job is small) == []
    assert buckets.next_batch(anything) == [large]
    assert buckets.next_batch(anything) == [small]


# --- waiting --------------------------------------------------------------------------------------


def test_nobody_waiting_is_never_due():
    assert make_buckets()[0].due_s(0.0) is None


def test_a_lone_prompt_on_an_idle_worker_does_not_wait():
    buckets, _ = make_buckets([20])
    assert buckets.due_s(0.0) == 0.0


def arrive(buckets, gaps, now_s=0.0) -> float:
    """Prompts arrive with these gaps and start at once; returns the time of the last."""
    for gap_s in gaps:
        now_s += gap_s
        buckets.add(make_job(20, arrived_s=now_s))
        buckets.next_batch(anything)
    return now_s


def test_a_prompt_after_a_pause_does_not_wait_though_a_burst_came_before():
    buckets, _ = make_buckets()
    now_s = arrive(buckets, [0.0001] * 50)
    buckets.add(make_job(20, arrived_s=now_s + 10))
    assert buckets.due_s(now_s + 10) <= now_s + 10


@pytest.mark.parametrize("pause_s", [0.1, 10.0, 86400.0])
def test_a_burst_is_recognised_soon_however_long_the_pause_before_it(pause_s):
    buckets, _ = make_buckets()
    now_s = arrive(buckets, [1.0, pause_s] + 12 * [0.0001])
    buckets.add(make_job(20, arrived_s=now_s))
    assert buckets.due_s(now_s) == pytest.approx(now_s + WAIT_S)


def test_prompts_of_a_burst_are_grouped():
    buckets, _ = make_buckets()
    now_s = arrive(buckets, 30 * [0.0001])
    started, sizes = now_s, []
    for number in range(20):
        at_s = now_s + 0.0001 * number
        buckets.add(make_job(20, arrived_s=at_s))
        if buckets.due_s(at_s) <= at_s:
            sizes.append(len(buckets.next_batch(anything)))
    assert started + WAIT_S > at_s
    assert sizes == []
    assert len(buckets.next_batch(anything)) == 20


def test_a_full_batch_does_not_wait():
    config = PrefillConfig(max_wait_s=WAIT_S, max_batch=3)
    buckets, _ = make_buckets([], config)
    now_s = arrive(buckets, 30 * [0.0])
    for _ in range(3):
        assert buckets.due_s(now_s) in (None, now_s + WAIT_S)
        buckets.add(make_job(20, arrived_s=now_s))
    assert buckets.due_s(now_s) == now_s


@pytest.mark.parametrize("place", [0, 1])
def test_a_near_deadline_ends_the_wait_of_all(place):
    buckets, _ = make_buckets()
    now_s = arrive(buckets, 30 * [0.0])
    deadlines = [1e9, 1e9]
    deadlines[place] = now_s + 0.9 * HURRY * WAIT_S
    for deadline_s in deadlines:
        buckets.add(make_job(20, arrived_s=now_s, deadline_s=deadline_s))
    assert buckets.due_s(now_s) == now_s


@given(
    st.lists(st.floats(0, 0.02), min_size=1, max_size=60),
    st.floats(0, 0.05),
    st.floats(0, 1),
)
def test_no_wait_is_longer_than_allowed(gaps, max_wait_s, patience_s):
    buckets = LengthBuckets(PrefillConfig(max_wait_s=max_wait_s))
    now_s = arrive(buckets, gaps)
    job = make_job(20, arrived_s=now_s, deadline_s=now_s + patience_s)
    buckets.add(job)
    due_s = buckets.due_s(now_s)
    assert due_s <= now_s + max_wait_s
    assert due_s == now_s or due_s <= now_s + patience_s / HURRY


def test_drop_takes_out_exactly_those_and_asks_once_each():
    buckets, jobs = make_buckets([1, 2, 3, 4])
    asked = []

    def is_gone(job) -> bool:
        asked.append(job)
        return job.num_tokens % 2 == 0

    assert buckets.drop(is_gone) == [jobs[1], jobs[3]]
    assert list(buckets) == [jobs[0], jobs[2]]
    assert asked == jobs
    assert buckets.num_tokens == 4
