"""Does it fit, and on which pair? The router's credits over both worker pools and the store.

A request is admitted when one prefill worker has room for its prompt, one decode worker that can
read the first one's KV has room for everything it may ever generate, and the store has room for the
hand-off. All three are taken before any work starts, or none: a request that runs never waits for
memory, so no two can hold what the other needs.

Credits are given back as the parts are done: prefill when its blocks are free, the store when the
KV has been fetched, decode at the end. A worker that is lost takes its books with it; credits on
the others stay. These are the books of one router: the worker owns the truth and may refuse, and
the caller then plans again without it. Owned by one thread; knows no sockets and no queue.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace

from router.disaggregation import ALONE, SPLIT, Decision
from router.fleet import Fleet, Pool
from router.needs import Needs
from router.policy import ANY, Candidate, LeastLoaded, Route, RoutingPolicy
from router.registry import Registry, WorkerInfo, WorkerRole, WorkerState
from tandem.errors import AlreadyExists, InvalidRequest, TandemError, Unavailable
from tandem.ledger import Ledger, PoolAudit
from tandem.registration import WorkerLoad

STORE = "store"  # as the name of who failed a request, beside the workers' ids
NOBODY: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Plan:
    """Where an admitted request runs. Credits are on the books under (request_id, epoch)."""

    request_id: str
    epoch: int
    needs: Needs
    prefill: WorkerInfo | None  # None: there is none, and `decision` is local
    decode: WorkerInfo
    store: str  # which start of the store
    decision: Decision = SPLIT  # where the prompt is computed
    prefill_tokens: int = 0  # of its prompt, less what the store is thought to have
    queued_before: int = 0  # tokens of other prompts, where its own is computed, when it was admitted
    num_kept: int = 0  # tokens of its prompt that its decode worker is thought to have

    @property
    def attempt(self) -> tuple[str, int]:
        return self.request_id, self.epoch

    def blamed(self, stage: str, error: TandemError) -> set[str]:
        """Who may be the cause of an error in that stage."""
        is_split = stage == "prefill" and not self.decision.is_local
        worker = self.prefill if is_split and self.prefill else self.decode
        return {worker.worker_id, STORE} if error.reason == "STORE_DOWN" else {worker.worker_id}


@dataclass(frozen=True, slots=True)
class Occupancy:
    """How much of one worker, or of the store, is given out."""

    owner: str
    role: str  # prefill | decode | store
    reserved_bytes: int
    capacity_bytes: int


class Admission:
    """The credits of one router. With `prefill_fallback` requests go without a prefill worker while all that
    there were are lost: their prompts are computed where they are decoded."""

    def __init__(
        self,
        policy: RoutingPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        prefill_fallback: bool = False,
    ) -> None:
        self._clock = clock
        self._prefill_fallback = prefill_fallback
        self._fleet = Fleet(policy or LeastLoaded())
        self._store: Ledger | None = None
        self._store_incarnation = ""
        self._largest = dict.fromkeys(WorkerRole, 0)  # blocks of the largest worker ever seen
        self._largest_store = 0  # bytes
        self._load_of: Callable[[str], WorkerLoad] = lambda worker_id: WorkerLoad()
        self.releases_after_loss = 0  # credits that went with their worker or store before they were returned

    def follow(self, registry: Registry) -> None:
        """Keep the set of workers equal to the registry's."""
        self._load_of = registry.load_of
        registry.subscribe(
            on_join=self.add_worker,
            on_loss=lambda info: self.remove_worker(info.worker_id),
            on_state=lambda info, state: self.set_accepting(info.worker_id, state is WorkerState.READY),
        )

    def load_of(self, worker_id: str) -> WorkerLoad:
        """What a worker last said of itself, if a registry is followed."""
        return self._load_of(worker_id)

    def add_worker(self, info: WorkerInfo) -> None:
        """Open empty books for a worker; those of an earlier start are dropped."""
        ledger = Ledger(f"{info.role.name.lower()}:{info.worker_id}", "blocks", info.num_blocks, self._clock)
        self._fleet.add(Pool(info, ledger))
        self._largest[info.role] = max(self._largest[info.role], info.num_blocks)

    def remove_worker(self, worker_id: str) -> None:
        """Drop a lost worker's books; what its requests hold elsewhere stays until they release it."""
        self._fleet.remove(worker_id)

    def set_accepting(self, worker_id: str, accepting: bool) -> None:
        """Whether new requests may go to a worker. Its books stay either way."""
        if pool := self._fleet.get(worker_id):
            pool.accepting = accepting
            self._fleet.changed(pool)

    def set_store(self, total_bytes: int, incarnation: str = "") -> None:
        """Open books for the store. Saying the same again changes nothing; a new start begins empty."""
        known = self._store is not None and self._store.total == total_bytes
        if not (known and self._store_incarnation == incarnation):
            self._store = Ledger("store", "bytes", total_bytes, self._clock)
            self._store_incarnation = incarnation
            self._largest_store = max(self._largest_store, total_bytes)

    def check_available(self) -> None:
        """Raise `NO_PREFILL`, `NO_DECODE` or `STORE_DOWN` if a part is missing altogether."""
        if not self._fleet.accepts(WorkerRole.PREFILL) and not self._lacks_prefill:
            raise Unavailable("NO_PREFILL", "no prefill worker is available")
        if not self._fleet.accepts(WorkerRole.DECODE):
            raise Unavailable("NO_DECODE", "no decode worker is available")
        if self._store is None:
            raise Unavailable("STORE_DOWN", "KV store is unavailable")

    def check_fits_ever(self, needs: Needs) -> None:
        """Raise `NEVER_FITS` if no worker known so far could hold the request even when idle.

        A lost worker counts: it is probably being restarted, and "never" must not be said for that.
        """
        self._check_largest(
            needs.decode_blocks, self._largest[WorkerRole.DECODE], "KV blocks", "largest worker"
        )
        prefill = self._largest[WorkerRole.PREFILL]
        self._check_largest(
            needs.prefill_blocks, prefill, "KV blocks for its prompt", "largest prefill worker"
        )
        self._check_largest(needs.store_bytes, self._largest_store, "bytes of KV store", "store")

    def fits_when_idle(self, needs: Needs, exclude: Collection[str] = NOBODY) -> bool:
        """Whether the workers present now could hold the request if nothing else ran."""
        if self._lacks_prefill:
            return self._fleet.fits_when_idle(None, needs.decode_blocks, exclude)
        has_store = self._store is not None and self._store.total >= needs.store_bytes
        return has_store and self._fleet.fits_when_idle(needs.prefill_blocks, needs.decode_blocks, exclude)

    def try_admit(
        self,
        request_id: str,
        epoch: int,
        needs: Needs,
        exclude: Collection[str] = NOBODY,
        route: Route = ANY,
    ) -> Plan | None:
        """Take all credits for one attempt, or none. `exclude` names workers that refused before."""
        store = self._store
        if self._lacks_prefill:
            return self._try_admit_alone(request_id, epoch, needs, exclude, route)
        if store is None or store.free < needs.store_bytes:
            return None
        pair = self._fleet.best_pair(needs.prefill_blocks, needs.decode_blocks, exclude, route)
        if pair is None:
            return None
        prefill, decode = pair
        wanted = (
            (prefill.ledger, needs.prefill_blocks),
            (decode.ledger, needs.decode_blocks),
            (store, needs.store_bytes),
        )
        _reserve_all(request_id, epoch, wanted)
        tokens = max(needs.prefill_tokens - route.stored_tokens, 1)
        prefill.queued_tokens += tokens
        for pool in pair:
            self._fleet.changed(pool)
        incarnation = self._store_incarnation
        return Plan(request_id, epoch, needs, prefill.info, decode.info, incarnation, prefill_tokens=tokens)

    def queued_before(self, plan: Plan) -> int:
        """Tokens of other prompts that its prefill worker has yet to compute."""
        pool = self._pool_of(plan.prefill)
        return pool.queued_tokens - plan.prefill_tokens if pool else 0

    def place(self, plan: Plan, decision: Decision, queued_before: int = 0, num_kept: int = 0) -> Plan:
        """The plan as decided; a prompt that stays with its decode worker gives the other credits back."""
        if decision.is_local and plan.prefill is not None:
            self.release_prefill(plan)
            self.release_store(plan)
        return replace(plan, decision=decision, queued_before=queued_before, num_kept=num_kept)

    def release_prefill(self, plan: Plan) -> None:
        """The prefill worker's blocks are free again."""
        pool = self._pool_of(plan.prefill)
        if pool is None:
            self.releases_after_loss += 1
        elif pool.ledger.release(plan.request_id, generation=plan.epoch):
            pool.queued_tokens -= plan.prefill_tokens
            self._fleet.changed(pool)

    def release_decode(self, plan: Plan) -> None:
        """The decode worker's blocks are free again."""
        pool = self._pool_of(plan.decode)
        if pool is None:
            self.releases_after_loss += 1
        elif pool.ledger.release(plan.request_id, generation=plan.epoch):
            self._fleet.changed(pool)

    def release_store(self, plan: Plan) -> None:
        """The store no longer holds the hand-off."""
        store = self._store_of(plan)
        if store is None:
            self.releases_after_loss += 1
        else:
            store.release(plan.request_id, generation=plan.epoch)

    def release_all(self, plan: Plan) -> None:
        """Give back whatever the plan still holds; what was returned before is not counted as late."""
        prefill, decode, store = self._pool_of(plan.prefill), self._pool_of(plan.decode), self._store_of(plan)
        if prefill and prefill.ledger.amount(plan.request_id, generation=plan.epoch):
            self.release_prefill(plan)
        if decode and decode.ledger.amount(plan.request_id, generation=plan.epoch):
            self.release_decode(plan)
        if store and store.amount(plan.request_id, generation=plan.epoch):
            self.release_store(plan)

    def audit(self, live_ids: Collection[str] | None = None) -> list[PoolAudit]:
        """The books of every worker and the store; records of other ids than `live_ids` are orphans."""
        ledgers = [pool.ledger for pool in self._fleet]
        return [ledger.audit(live_ids) for ledger in [*ledgers, *([self._store] if self._store else [])]]

    def occupancy(self) -> list[Occupancy]:
        """The books in bytes, for operators."""
        workers = [
            _occupancy(pool.info.worker_id, pool.info.role.name.lower(), pool.ledger, pool.info.block_bytes)
            for pool in self._fleet
        ]
        return workers + ([_occupancy("store", "store", self._store, 1)] if self._store else [])

    def candidates(self, role: WorkerRole) -> list[Candidate]:
        """The workers of one role that accept work, as the policy sees them."""
        return [p.candidate() for p in self._fleet if p.info.role is role and p.accepting]

    @property
    def _lacks_prefill(self) -> bool:
        """Whether requests go without a prefill worker now."""
        was_there = self._largest[WorkerRole.PREFILL] > 0
        return self._prefill_fallback and was_there and not self._fleet.num_workers(WorkerRole.PREFILL)

    def _try_admit_alone(
        self, request_id: str, epoch: int, needs: Needs, exclude: Collection[str], route: Route
    ) -> Plan | None:
        """Take credits on a decode worker only."""
        decode = self._fleet.best_decode(needs.decode_blocks, exclude, route)
        if decode is None:
            return None
        _reserve_all(request_id, epoch, [(decode.ledger, needs.decode_blocks)])
        self._fleet.changed(decode)
        return Plan(request_id, epoch, needs, None, decode.info, self._store_incarnation, ALONE)

    @staticmethod
    def _check_largest(needed: int, largest: int, unit: str, where: str) -> None:
        # Nothing known yet is not a reason to refuse for good.
        if 0 < largest < needed:
            raise InvalidRequest("NEVER_FITS", f"request needs {needed} {unit}; the {where} has {largest}")

    def _pool_of(self, info: WorkerInfo | None) -> Pool | None:
        pool = self._fleet.get(info.worker_id) if info else None
        return pool if pool and info and pool.info.incarnation == info.incarnation else None

    def _store_of(self, plan: Plan) -> Ledger | None:
        return self._store if self._store_incarnation == plan.store else None


def _occupancy(owner: str, role: str, ledger: Ledger, unit_bytes: int) -> Occupancy:
    reserved = ledger.total - ledger.free
    return Occupancy(owner, role, reserved * unit_bytes, ledger.total * unit_bytes)


def _reserve_all(owner: str, epoch: int, wanted: Iterable[tuple[Ledger, int]]) -> None:
    """Reserve in every ledger; there is room in each, so only a second record of an attempt fails."""
    taken: list[Ledger] = []
    for ledger, amount in wanted:
        if not ledger.reserve(owner, amount, generation=epoch):
            for earlier in taken:
                earlier.release(owner, generation=epoch)
            raise AlreadyExists("ID_IN_USE", "request_id is already running")
        taken.append(ledger)
