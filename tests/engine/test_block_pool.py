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


TEXTS = st.builds(lambda x, y: "x" * x + "y" * y, st.integers(1, 20), st.integers(0, 10))  # tokens


def names_of(text: str, num_tokens: int) -> list[bytes]:
    """One per whole block, of everything up to its end."""
    return [text[:end].encode() for end in range(4, num_tokens + 1, 4)]


class KeepingPool(RuleBasedStateMachine):
    """A model that knows what each block holds: a table must begin with what its names say, untouched."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool("test", num_blocks=12, block_size=4)
        self.contents = {}  # block → what was written into it last
        self.tables, self.texts, self.holds = {}, {}, {}

    @property
    def in_use(self):
        return {block for table in self.tables.values() for block in table}

    @rule(owner=OWNERS, text=TEXTS, extra=st.integers(1, 12))
    def allocate(self, owner, text, extra):
        names = names_of(text, len(text))
        before = self.in_use
        table = self.pool.allocate(owner, len(text) + extra, names=names)
        if table is None:
            return
        assert owner not in self.tables
        num_shared = self.pool.num_shared(owner)
        assert len(set(table)) == len(table) == -(-(len(text) + extra) // 4)
        assert not before & set(table[num_shared:])
        for block, name in zip(table[:num_shared], names, strict=False):
            assert self.contents[block] == name
        for block, name in list(zip(table, names, strict=False))[num_shared:]:
            self.contents[block] = name
        for block in table[max(num_shared, len(names)) :]:
            self.contents[block] = None
        self.tables[owner], self.texts[owner], self.holds[owner] = table, text, {"request"}

    @rule(owner=OWNERS)
    def name(self, owner):
        text = self.texts.get(owner, "unknown")
        self.pool.name(owner, names_of(text, len(text)))

    @rule(owner=OWNERS)
    def hold(self, owner):
        if self.pool.hold(owner, "writer"):
            self.holds[owner].add("writer")

    @rule(owner=OWNERS, hold=st.sampled_from(["request", "writer"]))
    def release(self, owner, hold):
        before = self.in_use
        freed = self.pool.release(owner, hold=hold)
        held = self.holds.get(owner, set())
        held.discard(hold)
        if owner in self.tables and not held:
            del self.tables[owner], self.texts[owner], self.holds[owner]
        assert freed == len(before - self.in_use)

    @rule(tokens=st.integers(1, 48))
    def all_that_is_free_can_be_had(self, tokens):
        table = self.pool.allocate("greedy", tokens)
        assert (table is not None) == (-(-tokens // 4) <= 12 - len(self.in_use))
        if table is not None:
            assert not self.in_use & set(table)
            self.contents |= dict.fromkeys(table)
            self.pool.release("greedy")

    @invariant()
    def books_agree(self):
        self.pool.check_integrity()
        assert self.pool.num_free == 12 - len(self.in_use)
        audit = self.pool.audit()
        assert (audit.owned, audit.is_balanced) == (len(self.in_use), True)


TestKeepingPool = KeepingPool.TestCase
TestKeepingPool.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


def test_the_end_of_a_sequence_goes_before_its_beginning():
    pool = BlockPool("test", num_blocks=6, block_size=4)
    names = [b"1", b"2", b"3", b"4"]
    table = pool.allocate("a", 20, names=names)
    pool.name("a", names)
    pool.release("a")
    pool.allocate("b", 12)  # two were free, and one more is needed
    found = pool.allocate("c", 12, names=names[:2])
    assert found[:2] == table[:2]
    assert pool.num_shared("c") == 2
    assert pool.audit().is_balanced


def test_blocks_that_several_use_are_counted_once_and_freed_by_the_last():
    pool = BlockPool("test", num_blocks=8, block_size=4)
    pool.allocate("first", 12, names=[b"1", b"2"])
    pool.name("first", [b"1", b"2"])
    assert pool.release("first") == 3
    one, two = (pool.allocate(owner, 12, names=[b"1", b"2"]) for owner in ("one", "two"))
    assert one[:2] == two[:2]
    assert one[2] != two[2]
    audit = pool.audit()
    assert (audit.owned, audit.free) == (4, 4)
    assert {owned.holds for owned in audit.owners} == {("request",), ("one/0", "two/0")}
    assert pool.release("one") == 1
    assert pool.release("two") == 3
    assert pool.audit().is_empty


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
