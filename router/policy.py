"""Which worker gets the next request: pure functions of a snapshot and of what is known of the request.

A policy keeps no state and reads no clock. It asks the fleet's view of the workers of one role and build
(`Workers`) and names one that fits. It does not know what a credit or a connection is.

`least-loaded`  the prefill worker with the shortest queue, the decode worker with most of its memory free.
`power-of-two`  the less loaded of two drawn by the request's name: routers that do not hear of each other's
                admissions do not all pick the same idle worker (Mitzenmacher 2001).
`kv-aware`      the decode worker with the best of its load less what it is thought to have of the prompt.
`session`       the decode worker of the request's session by rendezvous hashing (Thaler and Ravishankar
                1998): a worker that joins or leaves moves only the sessions that are or were its own.

The last two choose among decode workers only. Cached prefixes lie in the store, from where every prefill
worker reads them at the same cost, so that a prompt waits least where the queue is shortest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import xxhash


@dataclass(frozen=True, slots=True)
class Candidate:
    """One worker as a policy sees it, by the router's own books."""

    worker_id: str
    num_blocks: int
    free_blocks: int  # not given out: what is given out covers all that a request may still grow to
    queued_tokens: int = 0  # prompt tokens sent to it and not yet computed
    block_size: int = 1

    @property
    def prefill_load(self) -> float:
        """Tokens that wait: the time until a new prompt's turn grows with them."""
        return self.queued_tokens

    @property
    def decode_load(self) -> float:
        """The share of its blocks given out, so that unequal workers fill evenly."""
        return 1 - self.free_blocks / self.num_blocks


@dataclass(frozen=True, slots=True)
class Route:
    """What a policy may know of a request."""

    request_id: str = ""
    session: str = ""  # whose requests should meet the same worker again; empty: of no session
    cached_tokens: Mapping[str, int] = field(default_factory=dict)  # of the prompt, by worker id: a guess
    stored_tokens: int = 0  # of the prompt, in the store: a guess too


ANY = Route()


class Workers(Protocol):
    """The workers of one role and build that take work, and whether they have room for this request."""

    @property
    def names(self) -> Sequence[str]:
        """All ids, in order."""

    def fits(self, name: str) -> bool:
        """Whether the worker has room, and is not to be avoided."""

    def candidate(self, name: str) -> Candidate: ...

    def least_loaded(self) -> str | None:
        """The worker of the least load among those that fit; ties go to the smaller id."""


class RoutingPolicy(Protocol):
    """Names a worker that fits, or None if none does."""

    def prefill(self, workers: Workers, route: Route) -> str | None: ...

    def decode(self, workers: Workers, route: Route) -> str | None: ...


class LeastLoaded:
    """The default policy."""

    def prefill(self, workers: Workers, route: Route) -> str | None:
        return workers.least_loaded()

    def decode(self, workers: Workers, route: Route) -> str | None:
        return workers.least_loaded()


class PowerOfTwo:
    """The less loaded of two; of all, where neither has room."""

    def prefill(self, workers: Workers, route: Route) -> str | None:
        drawn = [workers.candidate(name) for name in _two(workers, route.request_id, seed=0)]
        return _lowest(drawn, lambda worker: worker.prefill_load) or workers.least_loaded()

    def decode(self, workers: Workers, route: Route) -> str | None:
        drawn = [workers.candidate(name) for name in _two(workers, route.request_id, seed=1)]
        return _lowest(drawn, lambda worker: worker.decode_load) or workers.least_loaded()


class KvAware(LeastLoaded):
    """A cached prefix of so many blocks is worth as many blocks of load."""

    def decode(self, workers: Workers, route: Route) -> str | None:
        idlest = workers.least_loaded()
        if idlest is None:
            return None
        names = {idlest, *filter(workers.fits, route.cached_tokens.keys() & {*workers.names})}

        def cost(name: str) -> tuple[float, str]:
            worker = workers.candidate(name)
            capacity = worker.num_blocks * worker.block_size
            return worker.decode_load - route.cached_tokens.get(name, 0) / capacity, name

        return min(map(cost, names))[1]


class SessionAffinity(LeastLoaded):
    """The session's own worker; the least loaded where that one has no room, or there is no session."""

    def decode(self, workers: Workers, route: Route) -> str | None:
        if not route.session or not workers.names:
            return workers.least_loaded()
        seed = _hash(route.session)
        own = max(workers.names, key=lambda name: _hash(name, seed))
        return own if workers.fits(own) else workers.least_loaded()


POLICIES: dict[str, type[RoutingPolicy]] = {
    "least-loaded": LeastLoaded,
    "power-of-two": PowerOfTwo,
    "kv-aware": KvAware,
    "session": SessionAffinity,
}


def _two(workers: Workers, request_id: str, seed: int) -> list[str]:
    """Those that fit of two different workers, drawn by the request's name."""
    names = workers.names
    if not names:
        return []
    drawn = _hash(request_id, seed)
    first = drawn % len(names)
    second = (first + 1 + (drawn >> 32) % max(len(names) - 1, 1)) % len(names)
    return [name for name in dict.fromkeys((names[first], names[second])) if workers.fits(name)]


def _lowest(drawn: Sequence[Candidate], load: Callable[[Candidate], float]) -> str | None:
    """The first one drawn, if they are equal."""
    return min(drawn, key=load).worker_id if drawn else None


def _hash(text: str, seed: int = 0) -> int:
    """64 bits, the same in every process."""
    return xxhash.xxh3_64_intdigest(text.encode(), seed)
