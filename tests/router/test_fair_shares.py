"""Fault row O7: a tenant that floods the queue waits behind its own requests, and others hardly notice."""

from __future__ import annotations

import heapq
import random
import time
from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import given

from router.fair_shares import SLACK, FairShares
from router.queue import RequestQueue
from tests.clock import ManualClock
from tests.router.test_queue import AGING_S, Waiting, anything, make_queue


def take(queue) -> Waiting:
    entry = queue.constrained_get(anything)
    assert entry is not None
    return entry.request


@given(st.lists(st.lists(st.integers(1, 64), min_size=1, max_size=30), min_size=2, max_size=5))
def test_tenants_that_wait_together_get_equal_shares(needs):
    """While two of them wait, what each was given differs by at most one request of each (Goyal 1996)."""
    queue = make_queue(ManualClock())
    left = Counter()
    for tenant, own in enumerate(needs):
        for number, need in enumerate(own):
            queue.put(Waiting(f"{tenant}-{number}", tenant=str(tenant)), need)
            left[tenant] += 1
    given_to = Counter(dict.fromkeys(left, 0))
    most = [max(own) for own in needs]
    while entry := queue.constrained_get(anything):
        tenant = int(entry.request.tenant)
        given_to[tenant] += entry.need
        left[tenant] -= 1
        waiting = [tenant for tenant in left if left[tenant]]
        for one in waiting:
            assert all(abs(given_to[one] - given_to[other]) <= most[one] + most[other] for other in waiting)


def test_whoever_comes_behind_a_flood_is_next_but_one():
    clock = ManualClock()
    queue = make_queue(clock)
    for number in range(5_000):
        queue.put(Waiting(f"flood-{number}", priority=20, tenant="flood"), 10)
    for _ in range(1_000):
        take(queue)
    clock.advance(1.0)
    queue.put(Waiting("late", priority=-20, tenant="other"), 10)
    assert "late" in {take(queue).request_id for _ in range(2)}


def test_nobody_saves_up_for_later():
    """Who asked for nothing while another was served gets half from then on, no more."""
    queue = make_queue(ManualClock())
    for number in range(300):
        queue.put(Waiting(f"busy-{number}", tenant="busy"), 1)
    for _ in range(100):
        take(queue)
    for number in range(100):
        queue.put(Waiting(f"late-{number}", tenant="late"), 1)
    served = Counter(take(queue).tenant for _ in range(100))
    assert abs(served["busy"] - served["late"]) <= 1


def test_priority_and_age_order_a_tenants_own():
    clock = ManualClock()
    queue = make_queue(clock)
    queue.put(Waiting("old", tenant="a"), 1)
    queue.put(Waiting("other", tenant="b"), 1)
    clock.advance(AGING_S / 2)
    queue.put(Waiting("urgent", priority=1, tenant="a"), 1)
    assert [take(queue).request_id for _ in range(3)] == ["urgent", "other", "old"]


def test_tenants_that_are_gone_are_forgotten():
    shares = FairShares()
    shares.enter("stays")
    for number in range(10_000):
        shares.enter(str(number))
        shares.serve(str(number), 0.5)
        shares.leave(str(number))
        shares.serve("stays", 1)
    assert len(shares._starts) <= SLACK + 3
    shares.leave("stays")
    assert shares._starts == {}


BLOCKS, RUN_S = 40, 2.0  # of the service; every request holds 1 block so long


def latencies(flood_per_s: float, *, is_fair: bool = True, quota: int = 500) -> list[float]:
    """From arrival to the end, of the requests of four tenants that together use 60 % of a service."""
    clock, rng = ManualClock(), random.Random(5)
    queue: RequestQueue[Waiting] = RequestQueue(10_000, AGING_S, clock)
    rates = {f"tenant-{number}": 0.15 * BLOCKS / RUN_S for number in range(4)}
    if flood_per_s:
        rates["flood"] = flood_per_s
    arrivals = [(clock() + rng.expovariate(rate), tenant) for tenant, rate in rates.items()]
    heapq.heapify(arrivals)
    ends: list[tuple[float, str]] = []
    here, names, found, number = Counter(), {}, [], 0
    until_s = clock() + 300.0
    while clock() < until_s:
        is_end = bool(ends) and ends[0][0] <= arrivals[0][0]
        at_s, tenant = heapq.heappop(ends if is_end else arrivals)
        clock.advance(at_s - clock())
        if is_end:
            here[tenant] -= 1
        else:
            heapq.heappush(arrivals, (at_s + rng.expovariate(rates[tenant]), tenant))
            if here[tenant] < quota:
                here[tenant] += 1
                number += 1
                names[str(number)] = tenant
                queue.put(Waiting(str(number), tenant=tenant if is_fair else ""), 1)
        while len(ends) < BLOCKS and (entry := queue.constrained_get(anything)):
            run_s = rng.uniform(0.5, 1.5) * RUN_S
            tenant = names.pop(entry.request.request_id)
            heapq.heappush(ends, (clock() + run_s, tenant))
            if tenant != "flood":
                found.append(clock() + run_s - entry.put_s)
    return sorted(found)


def test_a_flood_costs_others_little():
    """Eight times what the service can do, from one tenant, for five minutes of a virtual clock."""
    quiet, flooded = latencies(0.0), latencies(8 * BLOCKS / RUN_S)
    assert len(flooded) > 0.95 * len(quiet)
    for share in (0.5, 0.9, 0.99):
        place = int(share * min(len(quiet), len(flooded)))
        assert flooded[place] <= 1.5 * quiet[place], share
    together = latencies(8 * BLOCKS / RUN_S, is_fair=False)
    assert together[len(together) // 2] > 5 * quiet[len(quiet) // 2], "first come, first served would not do"


@pytest.mark.parametrize("num_tenants", [1, 100])
def test_a_put_and_a_get_cost_the_same_in_a_long_queue(num_tenants):
    def microseconds(length: int) -> float:
        queue = make_queue(ManualClock())
        for number in range(length):
            queue.put(Waiting(f"w{number}", tenant=str(number % num_tenants)), 1 + number % 1024)
        began_s = time.thread_time()  # what others do at the time costs nothing of it
        for number in range(500):
            queue.put(Waiting(f"n{number}", tenant=str(number % num_tenants)), 1 + number % 1024)
            queue.constrained_get(anything)
        return (time.thread_time() - began_s) / 500 * 1e6

    short, long = (min(microseconds(length) for _ in range(2)) for length in (200, 20_000))
    assert long < 6 * short, "logarithmic at most"
