"""One prompt on a prefill worker, from arrival to the last KV block handed off."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvstore.elsewhere import PieceElsewhere
from kvstore.key import KvHandle
from tandem.errors import TandemError
from tandem.output import OutputDelta
from tandem.prefix_usage import NO_HIT, PrefixHit
from tandem.work import Work


@dataclass(frozen=True, slots=True)
class KvOpened:
    """The KV is on its way to the store under that name."""

    handle: KvHandle


Event = OutputDelta | KvOpened | KvHandle | TandemError


@dataclass(slots=True, eq=False)
class PrefillJob:
    """`emit` may be called from any thread; `blocks` are set when memory was found.

    `is_cancelled` is raised by whoever lost interest and looked at between chunks.
    """

    work: Work
    emit: Callable[[Event], None]
    arrived_s: float = field(default_factory=time.monotonic)
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0  # tokens whose KV is in the cache
    pieces: Sequence[KvHandle | PieceElsewhere] = ()  # of its beginning, cached in a store
    hit: PrefixHit = NO_HIT  # what of the prompt came from there
    num_overtaken: int = 0  # batches of younger prompts that started while there was no memory for this one
    send_ns: int = 0  # time spent on sending the KV, most of it while the rest was computed
    handle: KvHandle | None = None  # once the store has sealed the KV
    has_draft_kv: bool = True  # as far as the draft model, if there is one, could follow
    is_handed_off: bool = False  # a hand-off holds the blocks too
    is_cancelled: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.work.token_ids)

    @property
    def num_left(self) -> int:
        return self.num_tokens - self.num_computed
