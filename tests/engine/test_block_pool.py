"""Blocks are conserved and never in two hands, whatever the order of operations."""

import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tandem.engine.block_pool import BlockPool

OWNERS = st.sampled_from(["a", "b", "c", "d"])
GENERATIONS = st.integers(0, 2)
HOLDS = st.sampled_from(["request", "writer-0", "writer-1"])


class Pool(RuleBasedStateMachine):
    """A model that keeps, per record, the blocks and holds it must have."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool("test", num_blocks=12, block_size=4)
        self.tables, self.holds = {}, {}

    @property
    def num_owned(self):
        return sum(map(len, self.tables.values()))

    @rule(owner=OWNERS, generation=GENERATIONS, num_tokens=st.integers(1, 60))
    def allocate(self, owner, generation, num_tokens):
        key, need = (owner, generation), -(-num_tokens // 4)
        fits = need <= 12 - self.num_owned
        assert self.pool.can_allocate(num_tokens) == fits
        table = self.pool.allocate(owner, num_tokens, generation)
        assert (table is not None) == (fits and key not in self.tables)
        if table is not None:
            taken = {block for other in self.tables.values() for block in other}
            assert len(set(table)) == len(table) == need
            assert not taken & set(table)
            self.tables[key], self.holds[key] = table, {"request"}

    @rule(owner=OWNERS, generation=GENERATIONS, hold=HOLDS)
    def hold(self, owner, generation, hold):
        alive = (owner, generation) in self.tables
        assert self.pool.hold(owner, hold, generation) == alive
        if alive:
            self.holds[owner, generation].add(hold)

    @rule(owner=OWNERS, generation=GENERATIONS, hold=HOLDS)
    def release(self, owner, generation, hold):
        """Also releases what is not held, twice, or of another generation."""
        key = (owner, generation)
        held = self.holds.get(key, set())
        expected = len(self.tables[key]) if held == {hold} else 0
        assert self.pool.release(owner, generation, hold) == expected
        held.discard(hold)
        if key in self.tables and not held:
            del self.tables[key], self.holds[key]

    @invariant()
    def books_agree(self):
        self.pool.check_integrity()
        assert self.pool.num_free == 12 - self.num_owned
        for (owner, generation), table in self.tables.items():
            assert self.pool.block_table(owner, generation) == table


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_writer_keeps_blocks_from_being_reused():
    pool = BlockPool("test", num_blocks=2, block_size=16)
    assert pool.allocate("a", 32) is not None
    assert pool.hold("a", "restore")
    assert pool.release("a") == 0
    assert pool.allocate("b", 1) is None
    assert pool.release("a", hold="restore") == 2
    assert pool.allocate("b", 1) is not None


def test_audit_lists_orphans_and_late_operations():
    pool = BlockPool("test", num_blocks=4, block_size=16)
    pool.allocate("gone", 17)
    pool.release("unknown")
    audit = pool.audit(live_owners={"alive"})
    assert [o.owner for o in audit.orphans] == ["gone"]
    assert (audit.is_balanced, audit.owned, audit.late_operations) == (True, 2, 1)


def test_refuses_an_empty_allocation():
    with pytest.raises(ValueError, match="0 tokens"):
        BlockPool("test", 1, 1).allocate("a", 0)


def test_threads_do_not_share_blocks():
    pool = BlockPool("test", num_blocks=16, block_size=1)
    in_use, clashes = set(), []

    def work(name):
        for i in range(300):
            table = pool.allocate(name, 3, generation=i) or []
            clashes.extend(in_use & set(table))
            in_use.update(table)
            in_use.difference_update(table)
            pool.release(name, generation=i)

    threads = [threading.Thread(target=work, args=(str(n),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pool.check_integrity()
    assert pool.audit().is_empty
    assert not clashes
