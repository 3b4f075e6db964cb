"""Credits are taken from both pools and the store, all or none, and each comes back exactly once."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from router.admission import Admission, Plan
from router.needs import Needs
from router.policy import Route
from router.registry import Registry, WorkerRole
from tandem.errors import AlreadyExists, InvalidRequest, Unavailable
from tests.clock import ManualClock
from tests.router.workers import decode_worker, prefill_worker

STORE_BYTES = 100_000


def needs(decode_blocks: int = 10, prefill_blocks: int = 4, store_bytes: int = 4096) -> Needs:
    return Needs(
        tokens=16 * decode_blocks,
        decode_blocks=decode_blocks,
        decode_bytes=1024 * decode_blocks,
        store_bytes=store_bytes,
        prefill_blocks=prefill_blocks,
        prefill_tokens=16 * prefill_blocks,
    )


@pytest.fixture
def admission():
    admission = Admission(clock=ManualClock())
    admission.set_store(STORE_BYTES)
    admission.add_worker(prefill_worker("p0", 256))
    admission.add_worker(decode_worker("d0", 640))
    return admission


def admit(admission: Admission, request_id: str = "r", wanted: Needs | None = None, epoch: int = 0) -> Plan:
    plan = admission.try_admit(request_id, epoch, wanted or needs())
    assert plan is not None
    return plan


def owned(admission: Admission) -> dict[str, int]:
    audits = admission.audit()
    assert all(audit.is_balanced for audit in audits)
    return {audit.pool: audit.owned for audit in audits}


# --- all or none -----------------------------------------------------------------------------------


def test_a_plan_takes_from_both_pools_and_the_store(admission):
    plan = admit(admission)
    assert (plan.prefill.worker_id, plan.decode.worker_id) == ("p0", "d0")
    assert owned(admission) == {"decode:d0": 10, "prefill:p0": 4, "store": 4096}


@pytest.mark.parametrize(
    "wanted",
    [needs(decode_blocks=641), needs(prefill_blocks=257), needs(store_bytes=STORE_BYTES + 1)],
    ids=["decode", "prefill", "store"],
)
def test_if_one_of_the_three_lacks_room_nothing_is_taken(admission, wanted):
    assert admission.try_admit("r", 0, wanted) is None
    assert set(owned(admission).values()) == {0}


def test_exactly_full_fits_and_one_more_does_not(admission):
    admit(admission, "a", needs(decode_blocks=640))
    assert admission.try_admit("b", 0, needs(decode_blocks=1)) is None


def test_the_same_attempt_is_not_admitted_twice_and_a_new_one_is(admission):
    admit(admission)
    before = owned(admission)
    with pytest.raises(AlreadyExists, match="ID_IN_USE"):
        admission.try_admit("r", 0, needs())
    assert owned(admission) == before
    admit(admission, epoch=1)


def test_a_second_record_found_late_gives_back_what_was_taken(admission):
    plan = admit(admission)
    admission.release_prefill(plan)
    with pytest.raises(AlreadyExists):
        admission.try_admit("r", 0, needs())
    assert owned(admission)["prefill:p0"] == 0
    assert {c.worker_id: c.queued_tokens for c in admission.candidates(WorkerRole.PREFILL)} == {"p0": 0}


# --- which pair ------------------------------------------------------------------------------------


def test_prompts_spread_over_prefill_workers_by_tokens_in_flight(admission):
    admission.add_worker(prefill_worker("p1"))
    first = admit(admission, "a", needs(prefill_blocks=10))
    assert [admit(admission, name).prefill.worker_id for name in ("b", "c")] == ["p1", "p1"]
    admission.release_prefill(first)
    assert admit(admission, "d").prefill.worker_id == "p0"


def test_only_workers_that_can_exchange_kv_are_paired(admission):
    admission.add_worker(decode_worker("d1", 10_000, fingerprint=b"g" * 32))
    admission.add_worker(decode_worker("d2", 10_000, block_size=32))
    assert admission.try_admit("r", 0, needs(decode_blocks=641)) is None
    admission.add_worker(prefill_worker("p1", fingerprint=b"g" * 32))
    plan = admit(admission, "r", needs(decode_blocks=641))
    assert (plan.prefill.worker_id, plan.decode.worker_id) == ("p1", "d1")


def test_workers_that_refused_can_be_left_out(admission):
    assert admission.try_admit("r", 0, needs(), exclude={"d0"}) is None
    admission.add_worker(decode_worker("d1"))
    plan = admission.try_admit("r", 1, needs(), exclude={"d0"})
    assert plan is not None
    assert plan.decode.worker_id == "d1"


def test_a_worker_that_does_not_accept_keeps_its_books(admission):
    plan = admit(admission)
    admission.set_accepting("d0", False)
    admission.set_accepting("nobody", False)
    assert admission.try_admit("s", 0, needs()) is None
    admission.release_decode(plan)
    assert owned(admission)["decode:d0"] == 0


# --- giving back -----------------------------------------------------------------------------------


def test_parts_come_back_one_by_one(admission):
    plan = admit(admission)
    admission.release_prefill(plan)
    assert owned(admission) == {"decode:d0": 10, "prefill:p0": 0, "store": 4096}
    admission.release_store(plan)
    assert owned(admission) == {"decode:d0": 10, "prefill:p0": 0, "store": 0}
    admission.release_decode(plan)
    assert set(owned(admission).values()) == {0}


def test_a_second_release_changes_nothing_and_is_counted(admission):
    plan, other = admit(admission), admit(admission, "other")
    for _ in range(3):
        admission.release_prefill(plan)
        admission.release_store(plan)
        admission.release_decode(plan)
    assert owned(admission) == {"decode:d0": 10, "prefill:p0": 4, "store": 4096}
    assert [audit.late_operations for audit in admission.audit()] == [2, 2, 2]
    (candidate,) = admission.candidates(WorkerRole.PREFILL)
    assert candidate.queued_tokens == other.needs.prefill_tokens


def test_release_all_gives_back_the_rest_and_counts_nothing_as_late(admission):
    plan = admit(admission)
    admission.release_prefill(plan)
    for _ in range(2):
        admission.release_all(plan)
    assert set(owned(admission).values()) == {0}
    assert [audit.late_operations for audit in admission.audit()] == [0, 0, 0]


def test_a_lost_worker_takes_its_books_and_no_others(admission):
    plan = admit(admission)
    admission.remove_worker("d0")
    assert owned(admission) == {"prefill:p0": 4, "store": 4096}
    admission.release_decode(plan)
    assert admission.releases_after_loss == 1
    admission.release_all(plan)
    assert set(owned(admission).values()) == {0}


def test_credits_of_a_dead_incarnation_do_not_touch_the_new_one(admission):
    plan = admit(admission)
    admission.remove_worker("d0")
    admission.add_worker(decode_worker("d0", 640, incarnation="2"))
    again = admit(admission, epoch=1)
    admission.release_decode(plan)
    assert owned(admission)["decode:d0"] == 10
    admission.release_decode(again)
    assert owned(admission)["decode:d0"] == 0
    assert [audit.late_operations for audit in admission.audit()] == [0, 0, 0]


def test_a_new_store_begins_empty_and_the_same_store_does_not(admission):
    plan = admit(admission)
    admission.set_store(STORE_BYTES)
    assert owned(admission)["store"] == 4096
    admission.set_store(STORE_BYTES, incarnation="2")
    assert owned(admission)["store"] == 0
    admission.release_store(plan)
    assert admission.releases_after_loss == 1


def test_an_audit_lists_credits_nobody_answers_for(admission):
    admit(admission, "alive")
    admit(admission, "forgotten")
    for audit in admission.audit({"alive"}):
        assert [orphan.owner for orphan in audit.orphans] == ["forgotten"]


# --- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (needs(decode_blocks=812), "request needs 812 KV blocks; the largest worker has 640"),
        (
            needs(prefill_blocks=300),
            "request needs 300 KV blocks for its prompt; the largest prefill worker has 256",
        ),
        (needs(store_bytes=100_001), "request needs 100001 bytes of KV store; the store has 100000"),
    ],
)
def test_what_can_never_fit_is_refused_with_the_numbers(admission, wanted, message):
    with pytest.raises(InvalidRequest) as caught:
        admission.check_fits_ever(wanted)
    assert (caught.value.reason, caught.value.message) == ("NEVER_FITS", message)
    assert not admission.fits_when_idle(wanted)


def test_never_is_not_said_because_of_load_or_a_lost_worker(admission):
    wanted = needs(decode_blocks=640)
    admit(admission)
    admission.check_fits_ever(wanted)
    assert admission.fits_when_idle(wanted)
    assert not admission.fits_when_idle(wanted, exclude={"d0"})
    assert admission.try_admit("s", 0, wanted) is None
    admission.remove_worker("d0")
    admission.check_fits_ever(wanted)
    assert not admission.fits_when_idle(wanted)
    Admission().check_fits_ever(wanted)  # nothing is known yet


def test_while_every_prefill_worker_is_lost_decode_workers_do_without():
    admission = Admission(clock=ManualClock(), prefill_fallback=True)
    admission.set_store(STORE_BYTES)
    admission.add_worker(decode_worker("d0", 640))
    with pytest.raises(Unavailable, match="NO_PREFILL"):  # none has come yet: the service starts
        admission.check_available()
    assert admission.try_admit("early", 0, needs()) is None
    admission.add_worker(prefill_worker("p0", 256))
    admission.set_accepting("p0", False)
    assert admission.try_admit("later", 0, needs()) is None  # it is late, or drains: not lost
    admission.remove_worker("p0")
    admission.check_available()
    assert admission.fits_when_idle(needs(decode_blocks=640))
    assert not admission.fits_when_idle(needs(), exclude={"d0"})
    assert admission.try_admit("r", 0, needs(decode_blocks=641)) is None
    plan = admit(admission)
    assert (plan.prefill, plan.decision.name) == (None, "local/no-prefill")
    assert owned(admission) == {"decode:d0": 10, "store": 0}
    admission.add_worker(prefill_worker("p0", 256))
    assert admit(admission, "split").prefill is not None
    for each in (admission.place(plan, plan.decision), plan):
        admission.release_all(each)
    assert owned(admission) == {"decode:d0": 10, "prefill:p0": 4, "store": 4096}
    assert admission.releases_after_loss == 0


def test_a_missing_part_is_named(admission):
    admission.check_available()
    without = Admission()
    without.add_worker(prefill_worker("p0", 256))
    without.add_worker(decode_worker("d0", 640))
    assert without.try_admit("r", 0, needs()) is None
    with pytest.raises(Unavailable, match="STORE_DOWN"):
        without.check_available()
    admission.set_accepting("d0", False)
    with pytest.raises(Unavailable, match="NO_DECODE"):
        admission.check_available()
    admission.remove_worker("p0")
    with pytest.raises(Unavailable, match="NO_PREFILL"):
        admission.check_available()


def test_it_follows_a_registry():
    clock = ManualClock()
    registry, admission = Registry(0.5, 2.0, clock), Admission(clock=clock)
    admission.set_store(STORE_BYTES)
    registry.register(prefill_worker())
    admission.follow(registry)
    registry.register(decode_worker())
    plan = admit(admission)
    registry.register(decode_worker(incarnation="2"))
    assert owned(admission) == {"decode:d0": 0, "prefill:p0": 4, "store": 4096}
    admission.release_all(plan)
    clock.advance(1.5)
    registry.expire()
    assert admission.try_admit("s", 0, needs()) is None, "suspects get no new work"
    clock.advance(0.5)
    registry.expire()
    assert owned(admission) == {"store": 0}


# --- any history -----------------------------------------------------------------------------------


class AnyHistory(RuleBasedStateMachine):
    """Random admissions, releases (some twice), losses and restarts against a plain model of the books."""

    plans = Bundle("plans")

    def __init__(self) -> None:
        super().__init__()
        self.admission = Admission(clock=ManualClock())
        self.admission.set_store(60)
        self.numbers = iter(range(10**6))
        self.held: dict[tuple[str, str], dict[str, int]] = {}  # (pool, its start) → request → amount
        self.to_compute: dict[str, int] = {}  # tokens of each prompt
        self.total: dict[tuple[str, str], int] = {("store", ""): 60}
        for info in (prefill_worker("p0", 30), decode_worker("d0", 40)):
            self.join(info)

    def join(self, info) -> None:
        self.admission.add_worker(info)
        self.total[f"{info.role.name.lower()}:{info.worker_id}", info.incarnation] = info.num_blocks

    def lose(self, pool: str) -> None:
        for key in [key for key in self.total if key[0] == pool]:
            del self.total[key]
            self.held.pop(key, None)

    @staticmethod
    def keys(plan: Plan) -> dict[str, tuple[str, str]]:
        return {
            "prefill": (f"prefill:{plan.prefill.worker_id}", plan.prefill.incarnation),
            "decode": (f"decode:{plan.decode.worker_id}", plan.decode.incarnation),
            "store": ("store", plan.store),
        }

    @rule(
        target=plans,
        decode=st.integers(1, 45),
        prefill=st.integers(1, 32),
        store=st.integers(1, 70),
        cached=st.integers(0, 600),
    )
    def admit(self, decode, prefill, store, cached):
        name = f"r{next(self.numbers)}"
        wanted = needs(decode, prefill, store)
        plan = self.admission.try_admit(name, 0, wanted, route=Route(stored_tokens=cached))
        if plan is None:
            assert not self.some_pair_has_room(wanted)
            return multiple()
        amounts = {"prefill": prefill, "decode": decode, "store": store}
        for part, key in self.keys(plan).items():
            self.held.setdefault(key, {})[name] = amounts[part]
        self.to_compute[name] = max(16 * prefill - cached, 1)
        return plan

    def some_pair_has_room(self, wanted: Needs) -> bool:
        free = {key: total - sum(self.held.get(key, {}).values()) for key, total in self.total.items()}

        def largest(kind: str) -> int:
            return max((room for (pool, _), room in free.items() if pool.startswith(kind)), default=-1)

        return (
            largest("prefill") >= wanted.prefill_blocks
            and largest("decode") >= wanted.decode_blocks
            and largest("store") >= wanted.store_bytes
        )

    @rule(plan=plans, part=st.sampled_from(["prefill", "decode", "store"]))
    def release_part_perhaps_again(self, plan, part):
        getattr(self.admission, f"release_{part}")(plan)
        self.held.get(self.keys(plan)[part], {}).pop(plan.request_id, None)

    @rule(plan=consumes(plans))
    def finish(self, plan):
        self.admission.release_all(plan)
        for key in self.keys(plan).values():
            self.held.get(key, {}).pop(plan.request_id, None)

    @rule(kind=st.sampled_from(["p", "d"]), number=st.integers(0, 2), blocks=st.integers(10, 50))
    def start_or_restart_worker(self, kind, number, blocks):
        make = prefill_worker if kind == "p" else decode_worker
        info = make(f"{kind}{number}", blocks, incarnation=f"i{next(self.numbers)}")
        self.lose(f"{info.role.name.lower()}:{info.worker_id}")
        self.join(info)

    @rule(role=st.sampled_from(WorkerRole), number=st.integers(0, 2))
    def lose_worker(self, role, number):
        name = role.name.lower()
        self.admission.remove_worker(f"{name[0]}{number}")
        self.lose(f"{name}:{name[0]}{number}")

    @rule()
    def restart_store(self):
        self.lose("store")
        incarnation = f"s{next(self.numbers)}"
        self.admission.set_store(60, incarnation)
        self.total["store", incarnation] = 60

    @invariant()
    def books_balance_and_equal_the_model(self):
        audits = {audit.pool: audit for audit in self.admission.audit()}
        assert set(audits) == {pool for pool, _ in self.total}
        for (pool, start), total in self.total.items():
            audit = audits[pool]
            assert audit.is_balanced
            assert 0 <= audit.owned <= audit.total == total
            assert {o.owner: o.amount for o in audit.owners} == self.held.get((pool, start), {})

    @invariant()
    def queued_tokens_are_those_of_running_prefills(self):
        for candidate in self.admission.candidates(WorkerRole.PREFILL):
            held = [v for (pool, _), v in self.held.items() if pool == f"prefill:{candidate.worker_id}"]
            assert candidate.queued_tokens == sum(self.to_compute[name] for v in held for name in v)

    def teardown(self):
        live = {name for amounts in self.held.values() for name in amounts}
        assert not [orphan for audit in self.admission.audit(live) for orphan in audit.orphans]


AnyHistory.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnyHistory = AnyHistory.TestCase


def test_after_any_number_of_requests_all_is_back(admission):
    admission.add_worker(decode_worker("d1", 50))
    running: list[Plan] = []
    for number in range(500):
        plan = admission.try_admit(f"r{number}", 0, needs(1 + number % 60, 1 + number % 7, 1 + number % 900))
        if plan is None or number % 3 == 0:
            for done in running[::2]:
                admission.release_all(done)
            running = running[1::2]
        if plan is not None:
            running.append(plan)
    for plan in running:
        admission.release_all(plan)
    assert all(audit.is_empty and audit.late_operations == 0 for audit in admission.audit(()))
    assert [c.queued_tokens for c in admission.candidates(WorkerRole.PREFILL)] == [0]
