"""What cached prefixes brought: one request, or a whole worker. Knows neither store nor model."""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem.pb.v1 import generation_pb2 as pb
from tandem.pb.worker.v1 import worker_pb2


@dataclass(frozen=True, slots=True, order=True)
class PrefixHit:
    """What of a prompt was restored and not computed."""

    num_tokens: int = 0
    num_bytes: int = 0  # of their KV
    saved_s: float = 0.0  # estimated prefill time, less the time to restore; negative where it did not pay

    @classmethod
    def from_pb(cls, message: worker_pb2.OutputDelta | pb.Usage) -> PrefixHit:
        return cls(message.cached, message.cached_bytes, message.cached_saved_ms / 1e3)

    def fill(self, message: worker_pb2.OutputDelta | pb.Usage) -> None:
        """Set the fields that both messages have."""
        message.cached = self.num_tokens
        message.cached_bytes = self.num_bytes
        message.cached_saved_ms = 1e3 * self.saved_s


NO_HIT = PrefixHit()


@dataclass(slots=True)
class IndexReport:
    """What went on between one process and the prefix index that stores share, since it started."""

    num_failures: int = 0  # commands that failed or took too long
    num_refused: int = 0  # values that none of our stores wrote: an alarm
    num_stale: int = 0  # pieces it named that their store does not have
    num_announced: int = 0  # by a store: pieces written


@dataclass(slots=True)
class PrefixReport:
    """Sums since a worker started. A decode worker restores prompts that come without KV."""

    num_prompts: int = 0  # that are long enough to look for; where blocks are kept too, each place counts
    num_hits: int = 0  # prompts of which something was restored
    num_tokens: int = 0  # restored and not computed
    num_bytes: int = 0
    restore_s: float = 0.0
    saved_s: float = 0.0  # as in `PrefixHit`
    num_published: int = 0  # pieces
    num_given_up: int = 0  # finished sequences: too many at once, too slow, or their blocks were needed
    num_failures: int = 0  # finding, restoring or publishing that the store ended
    num_elsewhere: int = 0  # pieces restored from other stores than the worker's own
    index: IndexReport = field(default_factory=IndexReport)

    def to_pb(self) -> worker_pb2.PrefixReport:
        return worker_pb2.PrefixReport(
            prompts=self.num_prompts,
            hits=self.num_hits,
            tokens=self.num_tokens,
            bytes=self.num_bytes,
            restore_s=self.restore_s,
            saved_s=self.saved_s,
            published=self.num_published,
            given_up=self.num_given_up,
            failures=self.num_failures,
            elsewhere=self.num_elsewhere,
            index_failures=self.index.num_failures,
            index_refused=self.index.num_refused,
            index_stale=self.index.num_stale,
        )

    @classmethod
    def from_pb(cls, message: worker_pb2.PrefixReport) -> PrefixReport:
        return cls(
            message.prompts,
            message.hits,
            message.tokens,
            message.bytes,
            message.restore_s,
            message.saved_s,
            message.published,
            message.given_up,
            message.failures,
            message.elsewhere,
            IndexReport(message.index_failures, message.index_refused, message.index_stale),
        )
