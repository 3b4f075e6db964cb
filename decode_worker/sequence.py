"""One request on a decode worker, from the order to decode it until its blocks are free."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from kvstore.key import KvHandle
from tandem.engine.batch import SequenceRows
from tandem.engine.rng import Stream
from tandem.engine.sampling_state import SamplingState
from tandem.errors import TandemError
from tandem.output import OutputDelta, OutputStream
from tandem.prefix_usage import NO_HIT, PrefixHit
from tandem.speculation import SpeculationPolicy
from tandem.speculation_usage import SpeculationUsage
from tandem.work import Work


@dataclass(frozen=True, slots=True)
class Started:
    """KV is in place: how long the request waited for the transfer to begin, and how long it took."""

    kv_wait_ns: int
    kv_read_ns: int
    prefetch_ns: int = 0  # spent before that on placing what came while the prompt was computed


Event = Started | OutputDelta | TandemError
Emit = Callable[[list[tuple["DecodeSequence", Event]]], None]  # on the event loop


@dataclass(slots=True, eq=False)
class DecodeSequence:
    """A running sequence. `blocks` for its longest possible output are reserved before KV is fetched.

    | positions             | what                                   |
    |-----------------------|----------------------------------------|
    | [0, num_computed)     | KV is in the cache                     |
    | [num_computed, total) | tokens to feed in the next forward (1) |
    """

    work: Work
    handle: KvHandle | None  # of the KV of all tokens but the last; None: none is computed yet
    emit: Emit
    output: OutputStream
    sampling: SamplingState
    blocks: list[int] = field(default_factory=list)
    arrived_ns: int = field(default_factory=time.monotonic_ns)
    num_draft_computed: int = 0  # tokens whose KV came for the draft model, too
    hit: PrefixHit = NO_HIT  # what stores had of a prompt that is computed here; said with its first token
    num_computed: int = field(init=False)
    next_token: int = field(init=False)
    token_ids: list[int] = field(init=False)  # prompt and output; the last one is `next_token`
    speculated: SpeculationUsage = field(default_factory=SpeculationUsage)
    tally: SpeculationUsage | None = None  # plain steps of a run, which `speculated` does not know yet
    needs_logits: bool = field(init=False)  # for penalties or log-probabilities; others need tokens only
    is_guessable: bool = field(init=False)  # no choice of a token depends on the tokens before it
    goes_by_confidence: bool = field(init=False)  # what its draft is sure of says how far it looks ahead
    is_plainly_greedy: bool = field(init=False)  # tokens are the arg max of raw logits, nothing else is asked
    is_silent: bool = True  # no token of it was handed over yet
    is_cancelled: bool = False
    is_finished: bool = False

    def __post_init__(self) -> None:
        params = self.sampling.params
        self.needs_logits = params.changes_logits or params.logprobs is not None
        self.is_guessable = not params.changes_logits
        self.goes_by_confidence = params.is_greedy and self.work.speculation.num_assistant_tokens is None
        self.is_plainly_greedy = params.is_greedy and not self.needs_logits
        self.num_computed = len(self.work.token_ids) - 1 if self.handle else 0
        self.next_token = self.work.token_ids[-1]
        self.token_ids = list(self.work.token_ids)

    @property
    def num_left(self) -> int:
        """Tokens whose KV is not in the cache yet; a running sequence has one."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_tokens_left(self) -> int:
        """That may come before the request has as many as it asks for."""
        return self.work.max_tokens - self.output.num_tokens

    @property
    def draft_stream(self) -> Stream | None:
        """Which numbers a draft token is drawn with; None for greedy requests.

        Under the `exact` policy draft and target share the number of a position, so that they agree
        often; speculative sampling needs one of its own.
        """
        if self.sampling.params.is_greedy:
            return None
        return Stream.DRAFT if self.work.speculation.policy is SpeculationPolicy.AUTO else Stream.TOKEN

    def rows(self) -> SequenceRows:
        """The next forward's rows: the one token whose KV is not in the cache yet."""
        return SequenceRows(
            token_ids=(self.next_token,), start=self.num_computed, block_table=self.blocks, num_logits=1
        )

    def usage(self) -> SpeculationUsage:
        """What speculation did, until now."""
        if self.tally is not None:
            self.speculated.count_plain(self.tally.num_steps, self.tally.verify_s, self.tally.plain_s)
            self.tally = None
        return self.speculated

    def take_hit(self) -> PrefixHit:
        """To be said once."""
        hit, self.hit = self.hit, NO_HIT
        return hit

    def advance(self, token_id: int) -> None:
        """The KV of `next_token` is in the cache, and this token comes after it."""
        self.num_computed += 1
        self.next_token = token_id
        self.token_ids.append(token_id)
