"""What this router has given decode workers: sequences, and prompts that they have yet to compute.

Its own books, not what heartbeats say: those are a second old, and a queue of prompts is shorter than that.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

Attempt = tuple[str, int]  # request id and epoch


class _Waiting(NamedTuple):
    worker_id: str
    num_tokens: int


class DecodeLoads:
    """Owned by the event loop. Every `begin` is followed by one `end`."""

    def __init__(self) -> None:
        self._num_sequences: Counter[str] = Counter()  # by worker
        self._num_waiting: Counter[str] = Counter()  # of them: those whose prompt waits there
        self._waiting_tokens: Counter[str] = Counter()
        self._prompts: dict[Attempt, _Waiting] = {}

    def begin(self, worker_id: str, attempt: Attempt, prompt_tokens: int = 0) -> None:
        """A request is admitted there, with so many tokens to be computed before its first one."""
        self._num_sequences[worker_id] += 1
        if prompt_tokens:
            self._prompts[attempt] = _Waiting(worker_id, prompt_tokens)
            self._num_waiting[worker_id] += 1
            self._waiting_tokens[worker_id] += prompt_tokens

    def computed(self, attempt: Attempt) -> None:
        """Its first token has come. Once or never; another time changes nothing."""
        if waiting := self._prompts.pop(attempt, None):
            _take(self._num_waiting, waiting.worker_id, 1)
            _take(self._waiting_tokens, waiting.worker_id, waiting.num_tokens)

    def end(self, worker_id: str, attempt: Attempt) -> None:
        """It has left, however that came."""
        self.computed(attempt)
        _take(self._num_sequences, worker_id, 1)

    def num_running(self, worker_id: str) -> int:
        """Sequences that a prompt computed there would keep waiting: not those before it in the line."""
        return self._num_sequences[worker_id] - self._num_waiting[worker_id]

    def waiting_tokens(self, worker_id: str) -> int:
        """Of prompts to be computed there."""
        return self._waiting_tokens[worker_id]


def _take(counter: Counter[str], name: str, amount: int) -> None:
    """A worker of which nothing is left is forgotten."""
    counter[name] -= amount
    if not counter[name]:
        del counter[name]
