"""The door: what is asked for becomes validated, tokenized, named requests, or an error that says why not.

Everything that can be refused for what it is, is refused here, before it takes a place or a byte.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from router.ask import Ask
from router.needs import check_context
from tandem.config import ClusterConfig
from tandem.errors import DeadlineExceeded, InvalidRequest, NotFound
from tandem.geometry import ModelGeometry
from tandem.metrics import RouterMetrics
from tandem.request import SEED_BITS, Request, check_request_id, child_id, scoped_id, seed_of_child
from tandem.sampling import SamplingParams, bad_param
from tandem.tokenizer import Tokenizer

MAX_PROMPT_BYTES = 256 << 10
THREAD_ABOVE_BYTES = 4 << 10  # longer texts are tokenized off the event loop
MIN_TIME_S = 0.001


class Intake:
    """Knows the model's limits and the server's defaults; keeps nothing."""

    def __init__(
        self,
        config: ClusterConfig,
        geometry: ModelGeometry,
        tokenizer: Tokenizer,
        metrics: RouterMetrics,
    ) -> None:
        self._config = config
        self._geometry = geometry
        self._tokenizer = tokenizer
        self._metrics = metrics
        self.model_name = config.model.served_name
        self.max_context = geometry.max_context

    async def requests(self, ask: Ask, time_left_s: float | None = None) -> list[Request]:
        """One request per completion asked for. Raises `TandemError` as the error table says.

        `time_left_s` is what the transport itself leaves, where it knows deadlines.
        """
        with self._metrics.refusals():
            return await self._requests(ask, time_left_s)

    async def _requests(self, ask: Ask, time_left_s: float | None) -> list[Request]:
        deadline_s = self._deadline_s(ask.timeout_s, time_left_s)
        request_id = check_request_id(ask.request_id or f"req-{secrets.token_hex(8)}")
        if ask.model not in ("", self.model_name):
            raise NotFound("NO_SUCH_MODEL", "not found")
        sampling = ask.sampling
        sampling.check_vocabulary(self._geometry.vocab_size)
        token_ids = await self._prompt(ask)
        max_tokens = self._max_tokens(len(token_ids), sampling)
        self._check_delivered(ask, max_tokens)
        request = Request(
            request_id=scoped_id(ask.tenant, request_id),
            token_ids=(*token_ids, *ask.delivered),
            num_prompt_tokens=len(token_ids),
            sampling=sampling,
            max_tokens=max_tokens,
            seed=secrets.randbits(SEED_BITS) if sampling.seed is None else sampling.seed,
            deadline_s=deadline_s,
            is_named=bool(ask.request_id),
            priority=ask.priority,
            tenant=ask.tenant,
            session=ask.session,
            speculation=ask.speculation,
        )
        return self._children(request)

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Raises `PROMPT_TOO_LONG` above 256 KiB."""
        num_bytes = len(text.encode("utf-8", "surrogatepass"))
        if num_bytes > MAX_PROMPT_BYTES:
            raise InvalidRequest(
                "PROMPT_TOO_LONG", f"prompt is {num_bytes} bytes; the limit is {MAX_PROMPT_BYTES}"
            )
        encode = partial(self._tokenizer.encode, text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(encode) if num_bytes > THREAD_ABOVE_BYTES else encode()

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of token ids. Raises `BAD_PARAM` for ids outside the vocabulary."""
        self._check_ids(token_ids)
        return self._tokenizer.decode(token_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, which may be a part of a character."""
        return self._tokenizer.token_bytes(token_id)

    def _deadline_s(self, *limits_s: float | None) -> float:
        """The earliest of the caller's limits and the server's default, on the monotonic clock."""
        left_s = min([self._config.router.default_timeout_s, *(s for s in limits_s if s is not None)])
        if left_s < MIN_TIME_S:
            raise DeadlineExceeded("queue")
        return time.monotonic() + left_s

    async def _prompt(self, ask: Ask) -> Sequence[int]:
        if isinstance(ask.prompt, str):
            token_ids: Sequence[int] = await self.tokenize(
                ask.prompt, add_special_tokens=ask.add_special_tokens
            )
        else:
            token_ids = ask.prompt
            self._check_ids(token_ids)
        if not token_ids:
            raise bad_param("the prompt must have at least one token")
        return token_ids

    def _check_ids(self, token_ids: Sequence[int]) -> None:
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < self._geometry.vocab_size):
            raise bad_param(f"`token_ids` must be in [0, {self._geometry.vocab_size})")

    def _check_delivered(self, ask: Ask, max_tokens: int) -> None:
        """Another seed, or another completion, would go on with another text."""
        if not ask.delivered:
            return
        self._check_ids(ask.delivered)
        if ask.sampling.n > 1 or len(ask.delivered) >= max_tokens:
            raise bad_param("`delivered_token_ids` need `n` 1, and must be fewer than `max_tokens`")
        if ask.sampling.seed is None and not ask.sampling.is_greedy:
            raise bad_param("`delivered_token_ids` need the `seed` they were drawn with")

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
                seed=seed_of_child(request.seed, index),
                lifecycle=type(request.lifecycle)(),
            )
            for index in range(num_children)
        ]
