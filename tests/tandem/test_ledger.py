"""The books of a pool balance after any history, and nothing is freed while somebody still holds it."""

from __future__ import annotations

import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tandem.ledger import Ledger
from tests.clock import ManualClock


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def ledger(clock):
    return Ledger("pool", "blocks", 10, clock)


def test_a_reservation_is_all_or_nothing(ledger):
    assert ledger.reserve("a", 7)
    assert not ledger.reserve("b", 4)
    assert ledger.free == 3
    assert ledger.reserve("b", 3)
    assert (ledger.free, ledger.amount("a"), ledger.amount("b"), ledger.amount("c")) == (0, 7, 3, 0)


def test_one_live_record_per_owner_and_generation(ledger):
    assert ledger.reserve("a", 1)
    assert not ledger.reserve("a", 1)
    assert ledger.reserve("a", 2, generation=1)
    assert (ledger.amount("a"), ledger.amount("a", generation=1)) == (1, 2)
    assert ledger.release("a") == 1
    assert ledger.amount("a", generation=1) == 2
    assert ledger.reserve("a", 1)


def test_nothing_is_free_while_a_writer_holds_it(ledger):
    ledger.reserve("a", 7)
    assert ledger.hold("a", "writer")
    assert ledger.release("a") == 0
    assert ledger.free == 3
    assert ledger.release("a", hold="writer") == 7
    assert ledger.free == 10


def test_a_writer_that_comes_too_late_is_told_so_and_counted(ledger):
    ledger.reserve("a", 7)
    ledger.release("a")
    assert not ledger.hold("a", "writer")
    assert ledger.late_operations == 1


@pytest.mark.parametrize("how", ["twice", "unknown", "another generation", "another hold"])
def test_a_release_that_makes_no_sense_is_counted_and_ignored(ledger, how):
    ledger.reserve("a", 7)
    if how == "twice":
        ledger.release("a")
        assert ledger.release("a") == 0
        assert ledger.free == 10
    elif how == "unknown":
        assert ledger.release("b") == 0
    elif how == "another generation":
        assert ledger.release("a", generation=1) == 0
    else:
        assert ledger.release("a", hold="writer") == 0
    assert ledger.late_operations == 1
    assert ledger.audit().is_balanced


def test_a_request_may_own_nothing_and_still_has_a_record(ledger):
    assert ledger.reserve("a", 0)
    assert not ledger.reserve("a", 0)
    assert not ledger.audit().owners[0].amount
    with pytest.raises(AssertionError):
        ledger.reserve("b", -1)


def test_an_audit_shows_owners_holds_and_age(ledger, clock):
    ledger.reserve("a", 7, generation=3)
    ledger.hold("a", "writer", generation=3)
    clock.advance(2.5)
    audit = ledger.audit()
    (owned,) = audit.owners
    assert (owned.owner, owned.generation, owned.amount) == ("a", 3, 7)
    assert owned.holds == ("request", "writer")
    assert owned.age_s == 2.5
    assert (audit.pool, audit.unit, audit.total, audit.free, audit.owned) == ("pool", "blocks", 10, 3, 7)
    assert audit.is_balanced
    assert not audit.is_empty


def test_an_audit_lists_those_whose_owner_is_gone(ledger):
    ledger.reserve("alive", 1)
    ledger.reserve("gone", 2)
    assert ledger.audit().orphans == ()
    assert [orphan.owner for orphan in ledger.audit({"alive"}).orphans] == ["gone"]


class AnyHistory(RuleBasedStateMachine):
    """Random operations against a dict that says what each record should hold."""

    owners = st.sampled_from("abc")
    generations = st.integers(0, 1)
    holds = st.sampled_from(["request", "writer", "reader"])

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger("pool", "blocks", 20, ManualClock())
        self.records: dict[tuple[str, int], tuple[int, set[str]]] = {}
        self.late = 0

    def free(self) -> int:
        return 20 - sum(amount for amount, _ in self.records.values())

    @rule(owner=owners, generation=generations, amount=st.integers(0, 25))
    def reserve(self, owner, generation, amount):
        expected = amount <= self.free() and (owner, generation) not in self.records
        assert self.ledger.reserve(owner, amount, generation=generation) is expected
        if expected:
            self.records[owner, generation] = (amount, {"request"})

    @rule(owner=owners, generation=generations, hold=holds)
    def hold(self, owner, generation, hold):
        known = (owner, generation) in self.records
        assert self.ledger.hold(owner, hold, generation=generation) is known
        if known:
            self.records[owner, generation][1].add(hold)
        else:
            self.late += 1

    @rule(owner=owners, generation=generations, hold=holds)
    def release(self, owner, generation, hold):
        freed = self.ledger.release(owner, generation=generation, hold=hold)
        amount, holds = self.records.get((owner, generation), (0, set()))
        if hold not in holds:
            self.late += 1
            assert freed == 0
            return
        holds.remove(hold)
        assert freed == (0 if holds else amount)
        if not holds:
            del self.records[owner, generation]

    @invariant()
    def books_agree(self):
        audit = self.ledger.audit()
        assert audit.is_balanced
        assert audit.free == self.free()
        assert audit.late_operations == self.late
        found = {(o.owner, o.generation): (o.amount, set(o.holds)) for o in audit.owners}
        assert found == self.records


AnyHistory.TestCase.settings = settings(max_examples=60, deadline=None)
TestAnyHistory = AnyHistory.TestCase


def test_threads_cannot_over_commit_a_pool():
    ledger = Ledger("pool", "blocks", 50)

    def work(name: str) -> None:
        for number in range(300):
            if ledger.reserve(f"{name}-{number}", 20):
                assert 0 <= ledger.free <= 30
                ledger.release(f"{name}-{number}")

    threads = [threading.Thread(target=work, args=(str(i),)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.audit(()).is_empty
    assert ledger.late_operations == 0
