"""The workers of a router with their books, found in the order in which the policy takes them.

A choice among a thousand workers costs a few steps of a heap, not a walk over all of them. Workers that can
exchange KV (same build, same block size) are kept together; a pair is always of one such group.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from router.policy import Candidate, RoutingPolicy
from router.ranking import Ranking
from router.registry import WorkerInfo, WorkerRole
from tandem.ledger import Ledger

Build = tuple[bytes, int]  # what must match for KV to be exchanged


@dataclass(slots=True)
class Pool:
    """One worker's books. Tell the fleet after changing them."""

    info: WorkerInfo
    ledger: Ledger
    accepting: bool = True
    queued_tokens: int = 0  # prompt tokens sent to it and not yet computed

    def candidate(self) -> Candidate:
        free = max(self.ledger.free, 0)
        return Candidate(self.info.worker_id, self.info.num_blocks, free, self.queued_tokens)

    @property
    def build(self) -> Build:
        return self.info.fingerprint, self.info.block_size


@dataclass(slots=True)
class _Side:
    """Workers of one role and build that accept work."""

    by_choice: Ranking = field(default_factory=Ranking)
    by_room: Ranking = field(default_factory=Ranking)  # most free blocks first


class Fleet:
    """Owned by one thread."""

    def __init__(self, policy: RoutingPolicy) -> None:
        self._policy = policy
        self._pools: dict[str, Pool] = {}
        self._sides: dict[WorkerRole, dict[Build, _Side]] = {role: {} for role in WorkerRole}

    def __iter__(self) -> Iterator[Pool]:
        """By worker id."""
        return (self._pools[worker_id] for worker_id in sorted(self._pools))

    def get(self, worker_id: str) -> Pool | None:
        return self._pools.get(worker_id)

    def add(self, pool: Pool) -> None:
        """An earlier start of the same worker is forgotten."""
        self.remove(pool.info.worker_id)
        self._pools[pool.info.worker_id] = pool
        self.changed(pool)

    def remove(self, worker_id: str) -> None:
        pool = self._pools.pop(worker_id, None)
        if pool is not None:
            self._leave(pool)

    def changed(self, pool: Pool) -> None:
        """Its books, or whether it accepts work, are other than before."""
        if not pool.accepting:
            self._leave(pool)
            return
        side = self._sides[pool.info.role].setdefault(pool.build, _Side())
        candidate = pool.candidate()
        is_prefill = pool.info.role is WorkerRole.PREFILL
        key = self._policy.prefill_key if is_prefill else self._policy.decode_key
        side.by_choice.put(candidate.worker_id, key(candidate))
        side.by_room.put(candidate.worker_id, (-candidate.free_blocks,))

    def best_pair(
        self, prefill_blocks: int, decode_blocks: int, exclude: Collection[str]
    ) -> tuple[Pool, Pool] | None:
        """The prefill and the decode worker that the policy takes first among those with room, or None."""
        pairs = []
        for build, decodes in self._sides[WorkerRole.DECODE].items():
            prefills = self._sides[WorkerRole.PREFILL].get(build)
            decode = self._first(decodes, decode_blocks, exclude)
            prefill = self._first(prefills, prefill_blocks, exclude) if prefills and decode else None
            if prefill and decode:
                name = decode.info.worker_id
                pairs.append((decodes.by_choice.key(name), name, prefill, decode))
        return min(pairs, key=lambda pair: pair[:2])[2:] if pairs else None

    def fits_when_idle(self, prefill_blocks: int, decode_blocks: int, exclude: Collection[str]) -> bool:
        """Whether some pair could hold so much if nothing else ran."""
        usable = [p for p in self._pools.values() if p.accepting and p.info.worker_id not in exclude]
        builds = {
            role: {p.build for p in usable if p.info.role is role and p.ledger.total >= blocks}
            for role, blocks in (
                (WorkerRole.PREFILL, prefill_blocks),
                (WorkerRole.DECODE, decode_blocks),
            )
        }
        return bool(builds[WorkerRole.PREFILL] & builds[WorkerRole.DECODE])

    def _first(self, side: _Side, blocks: int, exclude: Collection[str]) -> Pool | None:
        roomiest = side.by_room.first()
        if roomiest is None or self._pools[roomiest].ledger.free < blocks:
            return None

        def fits(worker_id: str) -> bool:
            return worker_id not in exclude and self._pools[worker_id].ledger.free >= blocks

        found = side.by_choice.first(fits)
        return None if found is None else self._pools[found]

    def _leave(self, pool: Pool) -> None:
        side = self._sides[pool.info.role].get(pool.build)
        if side is not None:
            side.by_choice.remove(pool.info.worker_id)
            side.by_room.remove(pool.info.worker_id)
