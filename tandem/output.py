"""One request's output: text as tokens arrive, and when to stop. Both kinds of worker use it.

Stops are looked at token by token in this order: end-of-text and stop tokens, stop strings, length.
Text that may turn out to be the beginning of a stop string is held back until it is decided.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tandem.pb.v1 import generation_pb2 as pb
from tandem.pb.worker.v1 import worker_pb2
from tandem.prefix_usage import NO_HIT, PrefixHit
from tandem.request import FinishReason
from tandem.sampling import SamplingParams
from tandem.speculation_usage import SpeculationUsage
from tandem.tokenizer import Tokenizer, TokenStream

FINISH_TO_PB = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}
Taken = tuple[str, FinishReason | None, str | int | None]  # the text of a token, and the end if it is one
FINISH_FROM_PB = {number: reason for reason, number in FINISH_TO_PB.items()}


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: the chosen token's, and the best alternatives'."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    def to_pb(self) -> pb.TokenLogprobs:
        top = [pb.TokenLogprob(token_id=token, logprob=logprob) for token, logprob in self.top]
        return pb.TokenLogprobs(logprob=self.logprob, top=top)

    @classmethod
    def from_pb(cls, message: pb.TokenLogprobs) -> TokenLogprobs:
        return cls(message.logprob, tuple((entry.token_id, entry.logprob) for entry in message.top))


class OutputDelta(NamedTuple):
    """New tokens of one request and the text they add. `finish` is set on the last one.

    A tuple, as one is made in each process that a token passes through.
    """

    token_ids: tuple[int, ...]
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: FinishReason | None = None
    matched_stop: str | int | None = None
    drafted: int = 0  # draft tokens proposed on the way to these tokens
    accepted: int = 0  # draft tokens among those proposed that the target accepted
    speculation: SpeculationUsage | None = None  # of the whole request, with its last token
    cached: PrefixHit = NO_HIT  # with the first token: prompt tokens whose KV was not computed again

    def followed_by(self, other: OutputDelta) -> OutputDelta:
        """Both as one."""
        return OutputDelta(
            self.token_ids + other.token_ids,
            self.text + other.text,
            self.logprobs + other.logprobs,
            other.finish,
            other.matched_stop,
            self.drafted + other.drafted,
            self.accepted + other.accepted,
            other.speculation,
            self.cached if other.cached is NO_HIT else max(self.cached, other.cached),
        )

    def fill(self, message: worker_pb2.OutputDelta) -> None:
        """An empty message, in place and with what there is only: at thousands of tokens a second the rest is
        seen."""
        message.token_ids.extend(self.token_ids)
        message.text = self.text
        if self.logprobs:
            message.logprobs.extend(entry.to_pb() for entry in self.logprobs)
        if self.drafted:
            message.drafted, message.accepted = self.drafted, self.accepted
        if self.cached is not NO_HIT:
            self.cached.fill(message)
        if self.finish is not None:
            message.finish_reason = FINISH_TO_PB[self.finish]
            set_matched_stop(message, self.matched_stop)
            if self.speculation:
                message.speculation.CopyFrom(self.speculation.to_pb())

    def to_pb(self) -> worker_pb2.OutputDelta:
        message = worker_pb2.OutputDelta()
        self.fill(message)
        return message

    @classmethod
    def from_pb(cls, message: worker_pb2.OutputDelta) -> OutputDelta:
        token_ids, text, entries = tuple(message.token_ids), message.text, message.logprobs
        logprobs = tuple(map(TokenLogprobs.from_pb, entries)) if entries else ()
        drafted, accepted = message.drafted, message.accepted
        cached = PrefixHit.from_pb(message) if message.cached else NO_HIT
        if not message.finish_reason:  # the rest comes with the last token
            return cls(token_ids, text, logprobs, None, None, drafted, accepted, None, cached)
        which = message.WhichOneof("matched_stop")
        return cls(
            token_ids,
            text,
            logprobs,
            FINISH_FROM_PB[message.finish_reason],
            getattr(message, which) if which else None,
            drafted,
            accepted,
            _speculation_of(message),
            cached,
        )


def _speculation_of(message: worker_pb2.OutputDelta) -> SpeculationUsage | None:
    return SpeculationUsage.from_pb(message.speculation) if message.HasField("speculation") else None


def set_matched_stop(message: worker_pb2.OutputDelta | pb.Finished, matched_stop: str | int | None) -> None:
    """Fill the `matched_stop` oneof that both messages have."""
    if isinstance(matched_stop, str):
        message.stop_string = matched_stop
    elif matched_stop is not None:
        message.stop_token_id = matched_stop


@dataclass(slots=True)
class OutputStream:
    """Turns the sampled tokens of one request into deltas, and finds the end.

    `token_ids` is the prompt followed by output tokens already delivered (a resumed request); those
    are replayed silently, so text and stop strings go on exactly where they were.
    """

    tokenizer: Tokenizer
    sampling: SamplingParams
    max_tokens: int
    eos_token_ids: Collection[int]
    token_ids: Sequence[int]
    num_prompt_tokens: int
    num_tokens: int = field(default=0, init=False)  # output tokens so far
    _stream: TokenStream = field(init=False, repr=False)
    _last_ids: Collection[int] = field(init=False, repr=False)  # that end the output
    _held: str = field(default="", init=False)  # decoded, but perhaps the start of a stop string

    def __post_init__(self) -> None:
        eos = () if self.sampling.ignore_eos else self.eos_token_ids
        self._last_ids = frozenset((*self.sampling.stop_token_ids, *eos))
        self._stream = self.tokenizer.stream(self.token_ids[: self.num_prompt_tokens])
        for token_id in self.token_ids[self.num_prompt_tokens :]:
            self.take(token_id)

    def append(self, token_id: int, logprobs: TokenLogprobs | None = None) -> OutputDelta:
        """Account for one sampled token."""
        text, finish, matched = self.take(token_id)
        entry = () if logprobs is None else (logprobs,)
        return OutputDelta((token_id,), text, entry, finish, matched)

    def take(self, token_id: int) -> Taken:
        """As `append`: what the delta of the token is made of, for those who put several into one."""
        self.num_tokens += 1
        if token_id in self._last_ids:
            return self._flush(), FinishReason.STOP, token_id
        text = self._stream.step(token_id)
        if self.sampling.stop:
            return self._look_for_stop(text)
        return text, FinishReason.LENGTH if self.num_tokens >= self.max_tokens else None, None

    def _look_for_stop(self, text: str) -> Taken:
        self._held += text
        if self.num_tokens >= self.sampling.min_tokens:
            at, stop = _find_first(self._held, self.sampling.stop)
            if stop is not None:
                self._held = self._held[:at]
                return self._flush(), FinishReason.STOP, stop
        if self.num_tokens >= self.max_tokens:
            return self._flush(), FinishReason.LENGTH, None
        keep = _longest_beginning(self._held, self.sampling.stop)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text, None, None

    def _flush(self) -> str:
        text, self._held = self._held, ""
        return text


def _find_first(text: str, stops: Sequence[str]) -> tuple[int, str | None]:
    """Where the earliest stop string begins, and which; the longest wins a tie."""
    found = [(text.find(stop), -len(stop), stop) for stop in stops if stop in text]
    if not found:
        return -1, None
    at, _, stop = min(found)
    return at, stop


def _longest_beginning(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that a stop string begins with."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest
