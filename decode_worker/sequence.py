"""One request on a decode worker, from the order to decode it until its blocks are free."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from kvstore.key import KvHandle
from tandem.engine.batch import SequenceRows
from tandem.engine.sampling_state import SamplingState
from tandem.errors import TandemError
from tandem.output import OutputDelta, OutputStream
from tandem.work import Work


@dataclass(frozen=True, slots=True)
class Started:
    """KV is in place: how long the request waited for the transfer to begin, and how long it took."""

    kv_wait_ns: int
    kv_read_ns: int


Event = Started | OutputDelta | TandemError
Emit = Callable[[list[tuple["DecodeSequence", Event]]], None]  # one call per step, on the event loop


@dataclass(slots=True, eq=False)
class DecodeSequence:
    """A running sequence. `blocks` for its longest possible output are reserved before KV is fetched.

    | positions             | what                                   |
    |-----------------------|----------------------------------------|
    | [0, num_computed)     | KV is in the cache                     |
    | [num_computed, total) | tokens to feed in the next forward (1) |
    """

    work: Work
    handle: KvHandle
    emit: Emit
    output: OutputStream
    sampling: SamplingState
    blocks: list[int] = field(default_factory=list)
    arrived_ns: int = field(default_factory=time.monotonic_ns)
    num_computed: int = field(init=False)
    next_token: int = field(init=False)
    is_cancelled: bool = False
    is_finished: bool = False

    def __post_init__(self) -> None:
        self.num_computed = len(self.work.token_ids) - 1
        self.next_token = self.work.token_ids[-1]

    def rows(self) -> SequenceRows:
        """The next forward's rows: the one token whose KV is not in the cache yet."""
        return SequenceRows(
            token_ids=(self.next_token,), start=self.num_computed, block_table=self.blocks, num_logits=1
        )

    def advance(self, token_id: int) -> None:
        """The forward is done and this token came out of it."""
        self.num_computed += 1
        self.next_token = token_id
        self.sampling.append(token_id)
