"""The work order a router sends to a worker: what to compute, from where, until when; and how it failed."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field, replace

from tandem.errors import InvalidRequest, TandemError, error_from_reason
from tandem.output import OutputStream
from tandem.pb.worker.v1 import worker_pb2 as pb
from tandem.request import Request
from tandem.sampling import SamplingParams
from tandem.speculation import SpeculationParams
from tandem.tokenizer import Tokenizer

HOP_MARGIN_S = 0.05  # each hop gets a little less time than the one before
MAX_TIMEOUT_MS = (1 << 32) - 1  # 49 days, what the field on the wire holds


def work_id(request_id: str, router_id: str) -> str:
    """What workers and the store call a request: callers of two routers may choose the same name."""
    return f"{request_id}@{router_id}"


def failure_to_pb(error: TandemError) -> pb.WorkFailed:
    """Of one order on a stream of many, where a status would end them all."""
    return pb.WorkFailed(
        reason=error.reason,
        message=error.message,
        error_id=error.error_id,
        retry_after_ms=error.retry_after_ms,
        metadata=error.metadata,
    )


def failure_from_pb(failed: pb.WorkFailed) -> TandemError:
    """As the worker raised it, with the id under which its log has more."""
    after_ms = failed.retry_after_ms if failed.HasField("retry_after_ms") else None
    error = error_from_reason(
        failed.reason, failed.message, retry_after_ms=after_ms, metadata=dict(failed.metadata)
    )
    error.error_id = failed.error_id or error.error_id
    return error


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One attempt (`epoch`) at a request. `deadline_s` is on the local monotonic clock."""

    request_id: str
    epoch: int
    token_ids: tuple[int, ...]  # prompt, then output tokens already delivered
    num_prompt_tokens: int
    sampling: SamplingParams  # max_tokens and seed are set
    deadline_s: float
    fingerprint: bytes
    speculation: SpeculationParams = field(default_factory=SpeculationParams)
    tenant: str = ""

    @classmethod
    def of(cls, request: Request, epoch: int, fingerprint: bytes, router_id: str) -> Work:
        return cls(
            request_id=work_id(request.request_id, router_id),
            epoch=epoch,
            token_ids=request.token_ids,
            num_prompt_tokens=request.num_prompt_tokens,
            sampling=replace(request.sampling, max_tokens=request.max_tokens, seed=request.seed, n=1),
            deadline_s=request.deadline_s,
            fingerprint=fingerprint,
            speculation=request.speculation,
            tenant=request.tenant,
        )

    @property
    def key(self) -> tuple[str, int]:
        return self.request_id, self.epoch

    @property
    def max_tokens(self) -> int:
        assert self.sampling.max_tokens is not None
        return self.sampling.max_tokens

    @property
    def seed(self) -> int:
        assert self.sampling.seed is not None
        return self.sampling.seed

    @property
    def max_total_tokens(self) -> int:
        return self.num_prompt_tokens + self.max_tokens

    def output_stream(self, tokenizer: Tokenizer, eos_token_ids: Collection[int]) -> OutputStream:
        """An output stream that has already seen the delivered tokens."""
        return OutputStream(
            tokenizer, self.sampling, self.max_tokens, eos_token_ids, self.token_ids, self.num_prompt_tokens
        )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise BAD_PARAM if a token id named anywhere does not exist: it would fail a whole batch."""
        if not all(0 <= token_id < vocab_size for token_id in self.token_ids):
            raise InvalidRequest("BAD_PARAM", f"a token id is outside [0, {vocab_size})")
        self.sampling.check_vocabulary(vocab_size)

    def time_left_s(self) -> float:
        return self.deadline_s - time.monotonic()

    def to_pb(self) -> pb.Work:
        timeout_ms = int(min(max(1e3 * (self.time_left_s() - HOP_MARGIN_S), 1), MAX_TIMEOUT_MS))
        return pb.Work(
            request_id=self.request_id,
            epoch=self.epoch,
            token_ids=self.token_ids,
            num_prompt_tokens=self.num_prompt_tokens,
            sampling=self.sampling.to_pb(),
            timeout_ms=timeout_ms,
            fingerprint=self.fingerprint,
            speculation=self.speculation.to_pb(),
            tenant=self.tenant,
        )

    @classmethod
    def from_pb(cls, message: pb.Work) -> Work:
        """Raises `InvalidRequest` for an order that no router of ours sends."""
        work = cls(
            request_id=message.request_id,
            epoch=message.epoch,
            token_ids=tuple(message.token_ids),
            num_prompt_tokens=message.num_prompt_tokens,
            sampling=SamplingParams.from_pb(message.sampling),
            deadline_s=time.monotonic() + message.timeout_ms / 1e3,
            fingerprint=message.fingerprint,
            speculation=SpeculationParams.from_pb(message.speculation),
            tenant=message.tenant,
        )
        if not work._is_complete:
            raise InvalidRequest("BAD_MESSAGE", "malformed request message")
        return work

    @property
    def _is_complete(self) -> bool:
        """There is a prompt, everything is resolved, and something is left to generate."""
        num_delivered = len(self.token_ids) - self.num_prompt_tokens
        max_tokens, seed = self.sampling.max_tokens, self.sampling.seed
        if max_tokens is None or seed is None:
            return False
        return self.num_prompt_tokens > 0 and 0 <= num_delivered < max_tokens
