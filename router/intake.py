"""The door: a wire message becomes validated, tokenized, named requests, or an error that says why not.

Everything that can be refused for what it is, is refused here, before it takes a place or a byte.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace

from google.protobuf import duration_pb2

from router.needs import check_context
from tandem.config import ClusterConfig
from tandem.errors import DeadlineExceeded, InvalidRequest, NotFound
from tandem.geometry import ModelGeometry
from tandem.pb.v1 import generation_pb2 as pb
from tandem.request import Request, check_request_id, child_id
from tandem.sampling import SamplingParams, bad_param
from tandem.speculation import SpeculationParams
from tandem.tokenizer import Tokenizer

MAX_PROMPT_BYTES = 256 << 10
THREAD_ABOVE_BYTES = 4 << 10  # longer texts are tokenized off the event loop
MIN_TIME_S = 0.001
SEED_BITS = 63


def _seconds(duration: duration_pb2.Duration) -> float:
    """A protobuf duration as a number, or `BAD_PARAM` if its fields are outside their ranges."""
    try:
        duration.ToJsonString()  # the one public function that checks them
    except ValueError:
        raise bad_param("`timeout` must be a duration of at most 10000 years") from None
    return float(duration.seconds + duration.nanos / 1e9)


class Intake:
    """Knows the model's limits and the server's defaults; keeps nothing."""

    def __init__(self, config: ClusterConfig, geometry: ModelGeometry, tokenizer: Tokenizer) -> None:
        self._config = config
        self._geometry = geometry
        self._tokenizer = tokenizer

    async def requests(self, message: pb.GenerationInput, time_left_s: float | None) -> list[Request]:
        """One request per completion asked for. Raises `TandemError` as the error table says."""
        deadline_s = self._deadline_s(message, time_left_s)
        request_id = check_request_id(message.request_id or f"req-{secrets.token_hex(8)}")
        if message.model not in ("", self._config.model.served_name):
            raise NotFound("NO_SUCH_MODEL", "not found")
        sampling = SamplingParams.from_pb(message.sampling)
        sampling.check_vocabulary(self._geometry.vocab_size)
        token_ids = await self._prompt(message)
        max_tokens = self._max_tokens(len(token_ids), sampling)
        request = Request(
            request_id=request_id,
            token_ids=tuple(token_ids),
            num_prompt_tokens=len(token_ids),
            sampling=sampling,
            max_tokens=max_tokens,
            seed=secrets.randbits(SEED_BITS) if sampling.seed is None else sampling.seed,
            deadline_s=deadline_s,
            priority=message.priority,
            speculation=SpeculationParams.from_pb(message.speculation),
        )
        return self._children(request)

    async def tokenize(self, text: str) -> list[int]:
        """Token ids of a text. Raises `PROMPT_TOO_LONG` above 256 KiB."""
        num_bytes = len(text.encode())
        if num_bytes > MAX_PROMPT_BYTES:
            raise InvalidRequest(
                "PROMPT_TOO_LONG", f"prompt is {num_bytes} bytes; the limit is {MAX_PROMPT_BYTES}"
            )
        if num_bytes > THREAD_ABOVE_BYTES:
            return await asyncio.to_thread(self._tokenizer.encode, text)
        return self._tokenizer.encode(text)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of token ids. Raises `BAD_PARAM` for ids outside the vocabulary."""
        self._check_ids(token_ids)
        return self._tokenizer.decode(token_ids)

    def _deadline_s(self, message: pb.GenerationInput, time_left_s: float | None) -> float:
        """The earliest of the caller's gRPC deadline, its timeout, and the server's default."""
        given_s = self._config.router.default_timeout_s
        if message.HasField("timeout"):
            given_s = min(given_s, _seconds(message.timeout))
        if time_left_s is not None:
            given_s = min(given_s, time_left_s)
        if given_s < MIN_TIME_S:
            raise DeadlineExceeded("queue")
        return time.monotonic() + given_s

    async def _prompt(self, message: pb.GenerationInput) -> Sequence[int]:
        match message.WhichOneof("input"):
            case "text":
                token_ids: Sequence[int] = await self.tokenize(message.text)
            case "token_ids":
                token_ids = message.token_ids.ids
                self._check_ids(token_ids)
            case _:
                raise bad_param("one of `text` and `token_ids` must be given")
        if not token_ids:
            raise bad_param("the prompt must have at least one token")
        return token_ids

    def _check_ids(self, token_ids: Sequence[int]) -> None:
        if token_ids and max(token_ids) >= self._geometry.vocab_size:
            raise bad_param(f"`token_ids` must be in [0, {self._geometry.vocab_size})")

    def _max_tokens(self, num_prompt_tokens: int, sampling: SamplingParams) -> int:
        """What was asked for, or whatever the context leaves; at least one token either way."""
        room = self._geometry.max_context - num_prompt_tokens
        max_tokens = sampling.max_tokens or max(room, 1)
        check_context(num_prompt_tokens, max_tokens, self._geometry.max_context)
        if sampling.min_tokens > max_tokens:
            raise bad_param("`min_tokens` must be between 0 and max_tokens")
        return max_tokens

    @staticmethod
    def _children(request: Request) -> list[Request]:
        """`n` requests, each with a name, a seed and a time line of its own."""
        num_children = request.sampling.n
        if num_children == 1:
            return [request]
        return [
            replace(
                request,
                request_id=child_id(request.request_id, index),
                seed=(request.seed + index) % (1 << SEED_BITS),
                lifecycle=type(request.lifecycle)(),
            )
            for index in range(num_children)
        ]
