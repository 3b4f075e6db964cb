"""Which workers exist, and whether they may be given work.

    register ──► READY ◄──────► SUSPECT      silent for a few heartbeats: no new work, nothing lost yet
                   │  ╲            │
                   │   ► DRAINING  │         says so itself: no new work, what runs goes on
                   ▼       ▼       ▼
                  lost: forgotten, and every listener is told once

A worker is named by its id and each start of it by its incarnation; a new incarnation means that
the old one is dead, whatever the clock says. This module holds no sockets and never polls: whoever
owns the event loop calls `expire`. It does not know what a request or a credit is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Self

from tandem.errors import FailedPrecondition, InvalidRequest
from tandem.pb.worker.v1 import worker_pb2
from tandem.registration import WorkerLoad
from tandem.request import REQUEST_ID

SUSPECT_AFTER_BEATS = 2.5  # half a beat of slack, so that one late heartbeat never makes a suspect


class WorkerRole(Enum):
    """What a worker does; the value is its number on the wire."""

    PREFILL = worker_pb2.WORKER_ROLE_PREFILL
    DECODE = worker_pb2.WORKER_ROLE_DECODE


class WorkerState(Enum):
    """Only READY workers are given new work."""

    READY = "ready"
    SUSPECT = "suspect"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerInfo:
    """What a worker is and what it can hold, as it announced itself."""

    worker_id: str
    incarnation: str  # changes with each start
    role: WorkerRole
    address: str  # host:port
    fingerprint: bytes  # of all that must match for KV to be exchanged
    block_size: int  # tokens
    num_blocks: int
    block_bytes: int
    streams_prefill: bool = False  # a prefill worker that takes all prompts over one stream
    takes_bundles: bool = False  # several orders in one message
    cores: str = ""  # the name of those that it shares with others who say the same

    @classmethod
    def from_pb(cls, message: worker_pb2.WorkerInfo) -> Self:
        """Raises `BAD_MESSAGE` unless every field makes sense."""
        sizes = (message.block_size, message.num_blocks, message.block_bytes)
        is_named = REQUEST_ID.fullmatch(message.worker_id) and message.incarnation and message.address
        has_role = message.role in (role.value for role in WorkerRole)  # proto3 enums are open
        if not is_named or not has_role or min(sizes) < 1:
            raise InvalidRequest("BAD_MESSAGE", "malformed request message")
        return cls(
            worker_id=message.worker_id,
            incarnation=message.incarnation,
            role=WorkerRole(message.role),
            address=message.address,
            fingerprint=message.fingerprint,
            block_size=message.block_size,
            num_blocks=message.num_blocks,
            block_bytes=message.block_bytes,
            streams_prefill=message.streams_prefill,
            takes_bundles=message.takes_bundles,
            cores=message.cores,
        )

    def to_pb(self) -> worker_pb2.WorkerInfo:
        return worker_pb2.WorkerInfo(
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            role=self.role.value,
            address=self.address,
            fingerprint=self.fingerprint,
            block_size=self.block_size,
            num_blocks=self.num_blocks,
            block_bytes=self.block_bytes,
            streams_prefill=self.streams_prefill,
            takes_bundles=self.takes_bundles,
            cores=self.cores,
        )

    def can_exchange_kv(self, other: WorkerInfo) -> bool:
        """Whether KV written by one can be read by the other."""
        return self.fingerprint == other.fingerprint and self.block_size == other.block_size


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker as the registry sees it now."""

    info: WorkerInfo
    state: WorkerState
    load: WorkerLoad
    silent_s: float


@dataclass(slots=True)
class _Worker:
    info: WorkerInfo
    heard_s: float
    state: WorkerState = WorkerState.READY
    load: WorkerLoad = field(default_factory=WorkerLoad)


class Registry:
    """The router's list of workers. Owned by one thread.

    Listeners are called in the order they subscribed, after the registry itself has changed, with
    the loss of an old incarnation before the arrival of the new one.
    """

    def __init__(
        self,
        heartbeat_s: float,
        worker_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        *,
        fingerprint: bytes | None = None,
    ) -> None:
        self.heartbeat_s = heartbeat_s
        self.worker_timeout_s = worker_timeout_s
        self.fingerprint = fingerprint
        self._clock = clock
        self._workers: dict[str, _Worker] = {}
        self._on_join: list[Callable[[WorkerInfo], None]] = []
        self._on_loss: list[Callable[[WorkerInfo], None]] = []
        self._on_state: list[Callable[[WorkerInfo, WorkerState], None]] = []

    def subscribe(
        self,
        *,
        on_join: Callable[[WorkerInfo], None] | None = None,
        on_loss: Callable[[WorkerInfo], None] | None = None,
        on_state: Callable[[WorkerInfo, WorkerState], None] | None = None,
    ) -> None:
        """Hear of workers from now on; those already known are announced to `on_join` at once."""
        if on_loss:
            self._on_loss.append(on_loss)
        if on_state:
            self._on_state.append(on_state)
        if on_join:
            self._on_join.append(on_join)
            for worker in list(self._workers.values()):
                on_join(worker.info)

    def register(self, info: WorkerInfo) -> None:
        """Take a worker in. Announcing the same start twice is harmless and counts as a heartbeat."""
        if self.fingerprint is not None and info.fingerprint != self.fingerprint:
            raise FailedPrecondition("FINGERPRINT_MISMATCH", "prefill and decode builds differ")
        known = self._workers.get(info.worker_id)
        if known is not None and known.info == info:
            self._hear(known)
            return
        if known is not None:
            self._forget(known)
        self._workers[info.worker_id] = _Worker(info, self._clock())
        for listener in self._on_join:
            listener(info)

    def heartbeat(self, worker_id: str, incarnation: str, load: WorkerLoad) -> bool:
        """Note a sign of life. False: this start of the worker is unknown and should register again."""
        worker = self._workers.get(worker_id)
        if worker is None or worker.info.incarnation != incarnation:
            return False
        worker.load = load
        self._hear(worker)
        return True

    def expire(self, now_s: float | None = None) -> list[WorkerInfo]:
        """Suspect the quiet and forget the silent; returns those lost, after telling the listeners."""
        now_s = self._clock() if now_s is None else now_s
        lost = []
        for worker in list(self._workers.values()):
            silent_s = now_s - worker.heard_s
            if silent_s >= self.worker_timeout_s:
                self._forget(worker)
                lost.append(worker.info)
            elif silent_s >= SUSPECT_AFTER_BEATS * self.heartbeat_s and worker.state is WorkerState.READY:
                self._enter(worker, WorkerState.SUSPECT)
        return lost

    def lose(self, worker_id: str, incarnation: str) -> bool:
        """Forget a worker at once, because its connection broke. False if that start is not known."""
        worker = self._workers.get(worker_id)
        if worker is None or worker.info.incarnation != incarnation:
            return False
        self._forget(worker)
        return True

    def get(self, worker_id: str) -> WorkerInfo | None:
        worker = self._workers.get(worker_id)
        return worker.info if worker else None

    def load_of(self, worker_id: str) -> WorkerLoad:
        """What it last said; of one that is not known, nothing."""
        worker = self._workers.get(worker_id)
        return worker.load if worker else WorkerLoad()

    def ready(self, role: WorkerRole) -> list[WorkerInfo]:
        """Workers of this role that may be given work, by id."""
        found = (w for w in self._workers.values() if w.info.role is role and w.state is WorkerState.READY)
        return sorted((w.info for w in found), key=lambda info: info.worker_id)

    def views(self) -> list[WorkerView]:
        """All workers by id, for operators."""
        now_s = self._clock()
        workers = sorted(self._workers.values(), key=lambda w: w.info.worker_id)
        return [WorkerView(w.info, w.state, w.load, now_s - w.heard_s) for w in workers]

    def _hear(self, worker: _Worker) -> None:
        worker.heard_s = self._clock()
        self._enter(worker, WorkerState.DRAINING if worker.load.draining else WorkerState.READY)

    def _enter(self, worker: _Worker, state: WorkerState) -> None:
        if state is worker.state:
            return
        worker.state = state
        for listener in self._on_state:
            listener(worker.info, state)

    def _forget(self, worker: _Worker) -> None:
        del self._workers[worker.info.worker_id]
        for listener in self._on_loss:
            listener(worker.info)
