"""Names of requests that have had their answer: whoever asks again within ten minutes gets the same one.

An answer may be lost behind the router, and then it is asked for again under its name. With the seed it was
drawn with, its tokens come out the same. Another request under that name is a mistake, and is refused.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tandem.errors import AlreadyExists
from tandem.request import Request, child_id, parent_id, seed_of_child

WINDOW_S = 600.0
MOST_NAMES = 100_000  # the oldest are forgotten first


@dataclass(frozen=True, slots=True)
class _Answer:
    """What was asked for, and the seed of its first completion."""

    body: bytes
    seed: int
    until_s: float


class AnsweredNames:
    """Of one router's life. Owned by the event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._answers: dict[str, _Answer] = {}  # the oldest first

    def __len__(self) -> int:
        return len(self._answers)

    def note(self, request: Request) -> None:
        """A completion has ended with an answer; the first one of a request speaks for all."""
        name, now_s = parent_id(request.request_id), self._clock()
        if not request.is_named or request.request_id not in (name, child_id(name, 0)):
            return
        self._answers.pop(name, None)
        self._answers[name] = _Answer(_body(request), request.seed, now_s + WINDOW_S)
        self._forget(now_s)

    def again(self, requests: Sequence[Request]) -> list[Request] | None:
        """The completions of one request with the seeds they had the last time; None under a new name.

        Raises `ID_REUSED_DIFFERENT_BODY`.
        """
        self._forget(self._clock())
        answer = self._answers.get(parent_id(requests[0].request_id))
        if answer is None:
            return None
        if answer.body != _body(requests[0]):
            raise AlreadyExists(
                "ID_REUSED_DIFFERENT_BODY",
                "request_id was given to another request in the last ten minutes; take a name of its own",
            )
        return [replace(r, seed=seed_of_child(answer.seed, index)) for index, r in enumerate(requests)]

    def _forget(self, now_s: float) -> None:
        while self._answers:
            oldest = next(iter(self._answers))
            if self._answers[oldest].until_s > now_s and len(self._answers) <= MOST_NAMES:
                break
            del self._answers[oldest]


def _body(request: Request) -> bytes:
    """What decides about an answer, in short."""
    return hashlib.blake2b(repr(request.body).encode(), digest_size=16).digest()
