"""What a client has received of one stream, and how it asks for the rest when the stream is lost.

A resumed request carries the output tokens that came before the last chunk; the server goes on behind them
with the same random numbers, as these depend on (seed, position) alone. What it sends again is compared
with what is known, and dropped: nothing is doubled or missing, and the end comes even if only it was lost.
"""

from __future__ import annotations

import secrets
import time

from tandem.errors import AlreadyExists, StreamBroken, TandemError, Unavailable
from tandem.pb.v1 import generation_pb2 as pb

FIRST_WAIT_S, LONGEST_WAIT_S = 0.05, 1.0
WORTH_RESUMING = (Unavailable, StreamBroken)
WORTH_WAITING = (*WORTH_RESUMING, AlreadyExists)  # the server has not noticed yet that the stream was lost


class StreamProgress:
    """One stream of one call or more. For `resume_s` after a loss another call is tried; 0 is never."""

    def __init__(self, message: pb.GenerationInput, timeout_s: float | None, resume_s: float) -> None:
        self._message = message
        self._deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._resume_s = resume_s if _is_exact(message) else 0.0
        if self._resume_s and not message.sampling.HasField("seed"):
            message.sampling.seed = secrets.randbits(63)
        self._token_ids: list[int] = []
        self._text = ""
        self._at = (0, 0)  # tokens and characters that the running call has come to
        self._before = (0, 0)  # the same before its last chunk
        self._has_begun = False
        self._num_running = message.sampling.n or 1
        self._lost: TandemError | None = None
        self._give_up_s = 0.0
        self._wait_s = FIRST_WAIT_S

    @property
    def time_left_s(self) -> float | None:
        """What the caller's time limit leaves for another call."""
        return None if self._deadline_s is None else max(self._deadline_s - time.monotonic(), 0.0)

    @property
    def has_ended(self) -> bool:
        """Whether every completion has finished; whatever befalls the call now is of no account."""
        return self._num_running == 0

    def rest(self) -> pb.GenerationInput:
        """What to ask for in the next call."""
        self._at = self._before
        del self._message.delivered_token_ids[:]
        self._message.delivered_token_ids.extend(self._token_ids[: self._before[0]])
        return self._message

    def take(self, event: pb.StreamGenerateResponse) -> pb.StreamGenerateResponse | None:
        """The event with what is new in it, or None. Raises `StreamBroken` if known text comes otherwise."""
        self._has_begun = True
        if event.WhichOneof("event") == "finished":
            self._num_running -= 1
        if event.WhichOneof("event") != "token_chunk" or not self._resume_s:
            return event
        chunk = event.token_chunk
        self._before, (num_tokens, num_characters) = self._at, self._at
        known_ids = self._token_ids[num_tokens : num_tokens + len(chunk.token_ids)]
        known_text = self._text[num_characters : num_characters + len(chunk.text)]
        if list(chunk.token_ids[: len(known_ids)]) != known_ids or not chunk.text.startswith(known_text):
            self._lost, self._give_up_s = StreamBroken(len(self._token_ids)), 0.0
            raise self._lost
        self._at = (num_tokens + len(chunk.token_ids), num_characters + len(chunk.text))
        del chunk.token_ids[: len(known_ids)]
        del chunk.logprobs[: len(known_ids)]
        chunk.text = chunk.text[len(known_text) :]
        chunk.position += len(known_ids)
        self._token_ids += chunk.token_ids
        self._text += chunk.text
        if not (chunk.token_ids or chunk.text):
            return None
        self._lost, self._wait_s = None, FIRST_WAIT_S  # it moves again
        return event

    def wait_after(self, error: TandemError) -> float:
        """Seconds until the next call. Raises what was lost first, if there should be none."""
        assert not self.has_ended
        now_s = time.monotonic()
        if self._lost is None:
            if not (self._resume_s and self._has_begun and isinstance(error, WORTH_RESUMING)):
                raise error
            self._lost, self._give_up_s = error, now_s + self._resume_s
        if now_s > self._give_up_s or not isinstance(error, WORTH_WAITING):
            raise self._lost from (None if error is self._lost else error)
        wait_s, self._wait_s = self._wait_s, min(2 * self._wait_s, LONGEST_WAIT_S)
        return wait_s


def _is_exact(message: pb.GenerationInput) -> bool:
    """Whether another call goes on with the same tokens. Draws of policy AUTO depend on the drafts too."""
    sampling = message.sampling
    draws_alike = message.speculation.policy != pb.SPECULATION_POLICY_AUTO or not sampling.temperature
    return (sampling.n or 1) == 1 and draws_alike
