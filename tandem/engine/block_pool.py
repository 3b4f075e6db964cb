"""Which blocks of the paged KV cache are free and who has the others. Knows ids and owners, no tensors.

A block returns to the free list only when its request and every writer into it are done: each is a
hold on the ledger record, so a restore that is still writing keeps its blocks from being handed out.

Blocks that were named before their owner left stay findable (kept_blocks.py), and a later table may begin
with them. A block that several tables use has a record of its own, with a hold for each.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection, Sequence

from tandem.engine.kept_blocks import KeptBlocks
from tandem.geometry import num_blocks as blocks_for
from tandem.ledger import REQUEST, Ledger, PoolAudit

Key = tuple[str, int]  # owner, generation


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens each. Thread-safe."""

    def __init__(self, name: str, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._ledger = Ledger(name, "blocks", num_blocks)
        self._free = list(range(num_blocks - 1, -1, -1))
        self._tables: dict[Key, list[int]] = {}
        self._num_shared: dict[Key, int] = {}  # blocks that a table begins with and others may use
        self._names: dict[Key, Sequence[bytes]] = {}  # of the blocks that a table begins with
        self._kept = KeptBlocks()
        self._lock = threading.Lock()

    @property
    def num_free(self) -> int:
        """Blocks that nobody uses, kept ones included."""
        return len(self._free) + self._kept.num_idle

    def can_allocate(self, num_tokens: int) -> bool:
        return blocks_for(num_tokens, self.block_size) <= self.num_free

    def allocate(
        self, owner: str, num_tokens: int, generation: int = 0, names: Sequence[bytes] = ()
    ) -> list[int] | None:
        """Block ids for that many tokens, or None if they do not fit or the owner already has some.

        The first are shared, and must not be written to, as far as blocks with these names are kept.
        """
        if num_tokens < 1:
            raise ValueError(f"cannot allocate blocks for {num_tokens} tokens")
        key, amount = (owner, generation), blocks_for(num_tokens, self.block_size)
        assert len(names) < amount, (len(names), amount)
        with self._lock:
            shared = self._kept.find(names)
            num_idle = sum(not self._kept.users[block] for block in shared)
            if amount - len(shared) > self.num_free - num_idle:
                return None
            if not self._ledger.reserve(owner, amount - len(shared), generation=generation):
                return None
            for block in shared:
                self._share(block, key)
            taken = [self._take() for _ in range(amount - len(shared))]
            self._tables[key], self._num_shared[key] = [*shared, *taken], len(shared)
            return list(self._tables[key])

    def block_table(self, owner: str, generation: int = 0) -> list[int] | None:
        """The block ids of a live record."""
        with self._lock:
            table = self._tables.get((owner, generation))
            return list(table) if table is not None else None

    def num_shared(self, owner: str, generation: int = 0) -> int:
        """How many blocks the owner's table begins with that hold what they were named after."""
        with self._lock:
            return self._num_shared.get((owner, generation), 0)

    def name(self, owner: str, names: Sequence[bytes], generation: int = 0) -> None:
        """The owner's first blocks are full, and stay findable under these names when it leaves."""
        with self._lock:
            if (owner, generation) in self._tables:
                self._names[owner, generation] = names

    def hold(self, owner: str, hold: str, generation: int = 0) -> bool:
        """Keep the owner's blocks from being reused until this hold is released. False if they are gone."""
        return self._ledger.hold(owner, hold, generation=generation)

    def release(self, owner: str, generation: int = 0, hold: str = REQUEST) -> int:
        """Drop one hold; returns how many blocks became free. A late or double release is only counted."""
        with self._lock:
            freed = self._ledger.release(owner, generation=generation, hold=hold)
            return freed + self._give_back((owner, generation)) if freed else 0

    def audit(self, live_owners: Collection[str] | None = None) -> PoolAudit:
        with self._lock:
            return self._ledger.audit(live_owners)

    def check_integrity(self) -> None:
        """Every block is free, kept, or in a table; only kept ones are in several; and the ledger agrees."""
        with self._lock:
            own = [block for key, table in self._tables.items() for block in table[self._num_shared[key] :]]
            users = Counter(
                block for key, table in self._tables.items() for block in table[: self._num_shared[key]]
            )
            assert users == self._kept.users, (users, self._kept.users)
            everywhere = [*self._free, *self._kept.idle, *own, *users]
            assert sorted(everywhere) == list(range(self.num_blocks)), (everywhere, self._tables)
            audit = self._ledger.audit()
            assert audit.is_balanced, audit
            assert audit.free == self.num_free, (audit, self.num_free)

    def _share(self, block: int, key: Key) -> None:
        record, hold = f"kept/{block}", f"{key[0]}/{key[1]}"
        if self._kept.users[block]:
            self._ledger.hold(record, hold)
        else:
            self._ledger.reserve(record, 1, hold=hold)
        self._kept.use(block)

    def _take(self) -> int:
        return self._free.pop() if self._free else self._kept.evict()

    def _give_back(self, key: Key) -> int:
        """The table's own blocks are free or kept; how many shared ones became idle."""
        table, num_shared = self._tables.pop(key), self._num_shared.pop(key)
        names = self._names.pop(key, ())
        shared, own = table[:num_shared], table[num_shared:]
        named = own[: max(0, len(names) - num_shared)]
        self._free.extend(own[len(named) :])
        self._free.extend(self._kept.keep(named, names[num_shared:]))
        for block in shared:
            self._ledger.release(f"kept/{block}", hold=f"{key[0]}/{key[1]}")
        return self._kept.leave(shared)
