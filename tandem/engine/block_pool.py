"""Which blocks of the paged KV cache are free and who has the others. Knows ids and owners, no tensors.

A block returns to the free list only when its request and every writer into it are done: each is a
hold on the ledger record, so a restore that is still writing keeps its blocks from being handed out.
"""

from __future__ import annotations

import threading
from collections.abc import Collection

from tandem.geometry import num_blocks as blocks_for
from tandem.ledger import REQUEST, Ledger, PoolAudit


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens each. Thread-safe."""

    def __init__(self, name: str, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._ledger = Ledger(name, "blocks", num_blocks)
        self._free = list(range(num_blocks - 1, -1, -1))
        self._tables: dict[tuple[str, int], list[int]] = {}
        self._lock = threading.Lock()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def can_allocate(self, num_tokens: int) -> bool:
        return blocks_for(num_tokens, self.block_size) <= self.num_free

    def allocate(self, owner: str, num_tokens: int, generation: int = 0) -> list[int] | None:
        """Block ids for that many tokens, or None if they do not fit or the owner already has some."""
        if num_tokens < 1:
            raise ValueError(f"cannot allocate blocks for {num_tokens} tokens")
        amount = blocks_for(num_tokens, self.block_size)
        with self._lock:
            if not self._ledger.reserve(owner, amount, generation=generation):
                return None
            taken = [self._free.pop() for _ in range(amount)]
            self._tables[owner, generation] = taken
            return list(taken)

    def block_table(self, owner: str, generation: int = 0) -> list[int] | None:
        """The block ids of a live record."""
        with self._lock:
            table = self._tables.get((owner, generation))
            return list(table) if table is not None else None

    def hold(self, owner: str, hold: str, generation: int = 0) -> bool:
        """Keep the owner's blocks from being reused until this hold is released. False if they are gone."""
        return self._ledger.hold(owner, hold, generation=generation)

    def release(self, owner: str, generation: int = 0, hold: str = REQUEST) -> int:
        """Drop one hold; returns how many blocks became free. A late or double release is only counted."""
        with self._lock:
            freed = self._ledger.release(owner, generation=generation, hold=hold)
            if freed:
                self._free.extend(self._tables.pop((owner, generation)))
            return freed

    def audit(self, live_owners: Collection[str] | None = None) -> PoolAudit:
        with self._lock:
            return self._ledger.audit(live_owners)

    def check_integrity(self) -> None:
        """Every block is either free or in exactly one table, and the ledger agrees."""
        with self._lock:
            owned = [block for table in self._tables.values() for block in table]
            assert sorted(self._free + owned) == list(range(self.num_blocks)), (self._free, self._tables)
            audit = self._ledger.audit()
            assert audit.is_balanced, audit
            assert audit.free == len(self._free), (audit, len(self._free))
