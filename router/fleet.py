"""The workers of a router with their books, found in the order in which the policy takes them.

A choice among a thousand workers costs a few steps of a heap, not a walk over all of them. Workers that can
exchange KV (same build, same block size) are kept together; a pair is always of one such group.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from router.policy import ANY, Candidate, Route, RoutingPolicy
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
        info, free = self.info, max(self.ledger.free, 0)
        return Candidate(info.worker_id, info.num_blocks, free, self.queued_tokens, info.block_size)

    @property
    def build(self) -> Build:
        return self.info.fingerprint, self.info.block_size


@dataclass(slots=True)
class _Side:
    """Workers of one role and build that accept work."""

    names: list[str] = field(default_factory=list)  # sorted
    by_load: Ranking = field(default_factory=Ranking)
    by_room: Ranking = field(default_factory=Ranking)  # most free blocks first

    def put(self, name: str, load: float, free_blocks: int) -> None:
        if name not in self.by_load:
            insort(self.names, name)
        self.by_load.put(name, load)
        self.by_room.put(name, -free_blocks)

    def remove(self, name: str) -> None:
        if name in self.by_load:
            del self.names[bisect_left(self.names, name)]
        self.by_load.remove(name)
        self.by_room.remove(name)


@dataclass(slots=True)
class _Workers:
    """One side as a policy sees it for one request: `router.policy.Workers`."""

    pools: Mapping[str, Pool]
    side: _Side
    blocks: int
    exclude: Collection[str]

    @property
    def names(self) -> Sequence[str]:
        return self.side.names

    def fits(self, name: str) -> bool:
        return name not in self.exclude and self.pools[name].ledger.free >= self.blocks

    def candidate(self, name: str) -> Candidate:
        return self.pools[name].candidate()

    def least_loaded(self) -> str | None:
        return self.side.by_load.first(self.fits)


class Fleet:
    """Owned by one thread."""

    def __init__(self, policy: RoutingPolicy) -> None:
        self._policy = policy
        self._pools: dict[str, Pool] = {}
        self._roles: Counter[WorkerRole] = Counter()
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
        self._roles[pool.info.role] += 1
        self.changed(pool)

    def remove(self, worker_id: str) -> None:
        pool = self._pools.pop(worker_id, None)
        if pool is not None:
            self._roles[pool.info.role] -= 1
            self._leave(pool)

    def num_workers(self, role: WorkerRole) -> int:
        """That are known, whether they accept work or not."""
        return self._roles[role]

    def accepts(self, role: WorkerRole) -> bool:
        """Whether some worker of the role accepts work."""
        return any(side.names for side in self._sides[role].values())

    def changed(self, pool: Pool) -> None:
        """Its books, or whether it accepts work, are other than before."""
        if not pool.accepting:
            self._leave(pool)
            return
        side = self._sides[pool.info.role].setdefault(pool.build, _Side())
        candidate = pool.candidate()
        is_prefill = pool.info.role is WorkerRole.PREFILL
        load = candidate.prefill_load if is_prefill else candidate.decode_load
        side.put(candidate.worker_id, load, candidate.free_blocks)

    def best_pair(
        self, prefill_blocks: int, decode_blocks: int, exclude: Collection[str], route: Route = ANY
    ) -> tuple[Pool, Pool] | None:
        """The prefill and the decode worker that the policy names among those with room, or None.

        Of several builds the one whose decode worker is less loaded is taken.
        """
        pairs = []
        for build, side in self._sides[WorkerRole.DECODE].items():
            decodes = self._with_room(side, decode_blocks, exclude)
            prefills = self._with_room(self._sides[WorkerRole.PREFILL].get(build), prefill_blocks, exclude)
            decode = decodes and self._policy.decode(decodes, route)
            prefill = prefills and decode and self._policy.prefill(prefills, route)
            if prefill and decode:
                pairs.append((side.by_load.key(decode), decode, prefill))
        if not pairs:
            return None
        _, decode, prefill = min(pairs)
        return self._pools[prefill], self._pools[decode]

    def best_decode(self, decode_blocks: int, exclude: Collection[str], route: Route = ANY) -> Pool | None:
        """The same without a prefill worker."""
        found = []
        for side in self._sides[WorkerRole.DECODE].values():
            decodes = self._with_room(side, decode_blocks, exclude)
            if decode := decodes and self._policy.decode(decodes, route):
                found.append((side.by_load.key(decode), decode))
        return self._pools[min(found)[1]] if found else None

    def fits_when_idle(
        self, prefill_blocks: int | None, decode_blocks: int, exclude: Collection[str]
    ) -> bool:
        """Whether some pair could hold so much if nothing else ran; some decode worker, if no prefill blocks
        are asked for."""
        usable = [p for p in self._pools.values() if p.accepting and p.info.worker_id not in exclude]
        builds = {
            role: {p.build for p in usable if p.info.role is role and p.ledger.total >= (blocks or 0)}
            for role, blocks in (
                (WorkerRole.PREFILL, prefill_blocks),
                (WorkerRole.DECODE, decode_blocks),
            )
        }
        if prefill_blocks is None:
            return bool(builds[WorkerRole.DECODE])
        return bool(builds[WorkerRole.PREFILL] & builds[WorkerRole.DECODE])

    def _with_room(self, side: _Side | None, blocks: int, exclude: Collection[str]) -> _Workers | None:
        """The side's workers, unless not even the roomiest could take so much."""
        roomiest = side.by_room.first() if side else None
        if side is None or roomiest is None or self._pools[roomiest].ledger.free < blocks:
            return None
        return _Workers(self._pools, side, blocks, exclude)

    def _leave(self, pool: Pool) -> None:
        side = self._sides[pool.info.role].get(pool.build)
        if side is not None:
            side.remove(pool.info.worker_id)
