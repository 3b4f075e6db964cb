"""What a prompt is charged for, and what is learnt, by the router's own books."""

from __future__ import annotations

import time

import pytest

from router.admission import Admission
from router.disaggregation import MIN_MEASURED, Decision, Why
from router.needs import Needs
from router.placement import Placement
from tandem.config import CacheConfig, ClusterConfig, KvStoreConfig, RouterConfig
from tandem.metrics import RouterMetrics
from tandem.request import Request, Timings
from tandem.sampling import SamplingParams
from tests.router.workers import decode_worker, prefill_worker

SPLIT = Decision(False, Why.UNMEASURED)


class Placed:
    """A router's books for one worker of each kind, without sockets."""

    def __init__(self, prefix_bytes: int = 0, prefill_cores: str = "", decode_cores: str = "") -> None:
        config = ClusterConfig(
            cache=CacheConfig(prefix_bytes=prefix_bytes),
            kvstore=KvStoreConfig(prefix_tokens=16),
            router=RouterConfig(disaggregate="auto", local_prefill_tokens=1000),
        )
        self.admission = Admission()
        self.admission.set_store(1 << 30)
        self.admission.add_worker(prefill_worker("p0", cores=prefill_cores))
        self.admission.add_worker(decode_worker("d0", cores=decode_cores))
        self.placement = Placement(config, self.admission, RouterMetrics(1.0))
        self.costs = self.placement._disaggregation._costs

    def measured(self, handoff_s: float) -> None:
        """A millisecond for each token on either side."""
        for _ in range(MIN_MEASURED):
            timings = Timings(prefill_ms=1.0, kv_read_ms=1e3 * handoff_s)
            self.placement._disaggregation.note(SPLIT, 1, timings)

    def place(self, request_id: str, token_ids: tuple[int, ...]):
        request = Request(
            request_id=request_id,
            token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            sampling=SamplingParams(),
            max_tokens=1,
            seed=0,
            deadline_s=time.monotonic() + 60,
        )
        traits = self.placement.traits(request)
        needs = Needs(len(token_ids) + 1, 4, 4096, 4096, 4, len(token_ids))
        plan = self.admission.try_admit(request_id, 1, needs, route=self.placement.route(traits))
        assert plan is not None
        return self.placement.place(plan, traits, frozenset())


def prompt(length: int, start: int = 0) -> tuple[int, ...]:
    return tuple(range(start, start + length))


def test_each_prompt_that_stays_is_queued_behind_those_that_stayed_before():
    router = Placed()
    router.measured(handoff_s=0.1)
    plans = [router.place(f"r{number}", prompt(40, 100 * number)) for number in range(4)]
    assert [(plan.decision.is_local, plan.queued_before) for plan in plans] == [
        (True, 0),
        (True, 40),
        (True, 80),  # 120 tokens in line would cost as long as here and the hand-off there: 140 ms
        (False, 0),
    ]
    router.placement.computed(plans[0])
    router.placement.end(plans[1])
    again = router.place("again", prompt(40, 900))
    assert (again.decision.is_local, again.queued_before) == (True, 40), "160 ms here, 180 there"
    longer = router.place("longer", prompt(60, 900))
    assert (longer.decision.is_local, longer.queued_before) == (False, 40), "260 ms here, 200 there"
    shorter = router.place("shorter", prompt(20, 900))
    assert (shorter.decision.is_local, shorter.queued_before) == (True, 0), "it is computed before the others"


def test_a_queue_at_the_prefill_worker_holds_what_the_store_does_not():
    router = Placed(prefix_bytes=1 << 20)
    known = prompt(64)
    first = router.place("first", known)
    assert first.decision.why is Why.CACHEABLE
    assert router.admission.queued_before(first) == 0
    second = router.place("second", known + prompt(6, 500))
    assert (second.queued_before, second.prefill_tokens) == (64, 6)
    third = router.place("third", prompt(64, 300))
    assert third.queued_before == 70
    for plan in (first, second, third):
        router.admission.release_all(plan)
    assert router.admission.queued_before(first) == -first.prefill_tokens


@pytest.mark.parametrize("num_restored", [0, 32])
def test_a_token_costs_what_it_took_and_not_what_others_made_it_wait(num_restored):
    router = Placed()
    router.measured(handoff_s=1.0)
    first, second = router.place("a", prompt(64)), router.place("b", prompt(64, 100))
    assert first.decision.is_local
    assert second.decision.is_local
    router.costs.local_s_per_token = 0.0
    num_computed = 64 + 64 - num_restored
    router.placement.learn(second, Timings(prefill_ms=5.0 * num_computed), num_restored)
    assert router.costs.local_s_per_token == pytest.approx(0.005)


def test_the_split_learns_from_its_own_line():
    router = Placed()
    first, second = router.place("a", prompt(64)), router.place("b", prompt(64, 100))
    for plan in (first, second):
        router.costs.split_s_per_token = 0.0
        took_ms = 2.0 * (plan.queued_before + 64)
        router.placement.learn(plan, Timings(prefill_ms=took_ms, kv_read_ms=1.0), 0)
        assert router.costs.split_s_per_token == pytest.approx(0.002)


@pytest.mark.parametrize(
    ("prefill", "decode", "is_local"), [("", "", False), ("a", "b", False), ("b", "b", True)]
)
def test_a_split_between_workers_that_share_their_cores_brings_nothing(prefill, decode, is_local):
    """Four sequences run there: 125 ms of somebody's time locally, 35 in a split."""
    router = Placed(prefill_cores=prefill, decode_cores=decode)
    router.measured(handoff_s=0.01)
    router.costs.split_s_per_token = 0.0005
    for number in range(4):
        router.placement.computed(router.place(f"r{number}", prompt(50, 100 * number)))
    assert router.place("last", prompt(50, 900)).decision.is_local is is_local
