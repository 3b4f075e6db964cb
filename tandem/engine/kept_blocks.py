"""Whole blocks that stay findable by the name of their content after the request that filled them.

Those that nobody uses are *idle*: free for whoever needs room, the least recently used first. The books over
all blocks are the pool's (block_pool.py), whose lock guards this too.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class KeptBlocks:
    """Names of blocks, and how many tables use each."""

    def __init__(self) -> None:
        self.users: Counter[int] = Counter()
        self._block_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    @property
    def idle(self) -> list[int]:
        return list(self._idle)

    def find(self, names: Iterable[bytes]) -> list[int]:
        """The blocks of the longest run of names that are known, from the first on."""
        found = []
        for name in names:
            block = self._block_of.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def use(self, block: int) -> None:
        """One more table begins with this block."""
        self.users[block] += 1
        self._idle.pop(block, None)

    def leave(self, blocks: Sequence[int]) -> int:
        """A table that used these is gone; how many of them are idle now."""
        num_idle = 0
        for block in reversed(blocks):  # the end of a sequence goes before what it stands on
            self.users[block] -= 1
            if not self.users[block]:
                del self.users[block]
                self._idle[block] = None
                num_idle += 1
        return num_idle

    def keep(self, blocks: Sequence[int], names: Sequence[bytes]) -> list[int]:
        """Blocks whose owner is gone and what they hold: idle from here on. Returns those that are not kept,
        as another block has that name."""
        known = []
        for block, name in zip(reversed(blocks), reversed(names), strict=True):
            if name in self._block_of:
                known.append(block)
                continue
            self._block_of[name], self._name_of[block] = block, name
            self._idle[block] = None
        return known

    def evict(self) -> int:
        """Forget the idle block that was not used for longest; it is the caller's."""
        block, _ = self._idle.popitem(last=False)
        del self._block_of[self._name_of.pop(block)]
        return block
