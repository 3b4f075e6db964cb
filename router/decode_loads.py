"""What this router has given decode workers: sequences, and prompts that they have yet to compute.

Its own books, not what heartbeats say: those are a second old, and a queue of prompts is shorter than that.
A worker computes short prompts first (decode_worker/local_prefill.py), so only those are before another.
"""

from __future__ import annotations

from collections import Counter, defaultdict

Attempt = tuple[str, int]  # request id and epoch


class DecodeLoads:
    """Owned by the event loop. Every `begin` is followed by one `end`."""

    def __init__(self) -> None:
        self._num_sequences: Counter[str] = Counter()  # by worker
        self._lines: defaultdict[str, dict[Attempt, int]] = defaultdict(dict)  # tokens of prompts that wait
        self._workers: dict[Attempt, str] = {}  # of these prompts

    def begin(self, worker_id: str, attempt: Attempt, prompt_tokens: int = 0) -> None:
        """A request is admitted there, with so many tokens to be computed before its first one."""
        self._num_sequences[worker_id] += 1
        if prompt_tokens:
            self._workers[attempt] = worker_id
            self._lines[worker_id][attempt] = prompt_tokens

    def computed(self, attempt: Attempt) -> None:
        """Its first token has come. Once or never; another time changes nothing."""
        worker_id = self._workers.pop(attempt, None)
        if worker_id is None:
            return
        line = self._lines[worker_id]
        del line[attempt]
        if not line:
            del self._lines[worker_id]

    def end(self, worker_id: str, attempt: Attempt) -> None:
        """It has left, however that came."""
        self.computed(attempt)
        self._num_sequences[worker_id] -= 1
        if not self._num_sequences[worker_id]:
            del self._num_sequences[worker_id]

    def num_running(self, worker_id: str) -> int:
        """Sequences that a prompt computed there would keep waiting: not those before it in the line."""
        return self._num_sequences[worker_id] - len(self._lines.get(worker_id, ()))

    def tokens_before(self, worker_id: str, prompt_tokens: int) -> int:
        """Of prompts to be computed there before one with so many tokens."""
        line = self._lines.get(worker_id)
        return sum(tokens for tokens in line.values() if tokens <= prompt_tokens) if line else 0
