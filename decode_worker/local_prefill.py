"""Prompts that come without KV are computed here, a chunk between two steps of the sequences that run.

Who has the least left is next, so that short prompts do not wait for long ones. The oldest of those that have
let others by for as long as they take has every second chunk.

The router sends one where that costs less than the way over a prefill worker and the store. Chunks of a
prompt have the same bits wherever they are cut and computed, so the tokens are the same. Owned by the step
thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from decode_worker.decoder import Advance, advance_by
from decode_worker.sequence import DecodeSequence
from tandem.config import ClusterConfig
from tandem.engine.batch import SequenceRows
from tandem.engine.model_runner import ModelRunner
from tandem.engine.sampler import Sampler
from tandem.profiling.spans import span
from tandem.token_cost import LEAST_CHUNK_TOKENS, TokenCost

LEAST_STALL_S = 0.03
STALL_SHARE = 1 / 3  # of the longest gap that is asked for: steps come on top, and some chunks take longer


def stall_of(config: ClusterConfig) -> float:
    """About so many seconds running sequences may wait for a chunk of more than `LEAST_CHUNK_TOKENS`."""
    return config.decode.stall_s or max(LEAST_STALL_S, STALL_SHARE * config.router.itl_limit_s)


@dataclass(frozen=True, slots=True)
class _Place:
    """In the line, since when, and with how much to compute."""

    num_tokens: int
    since_s: float = field(default_factory=time.monotonic)


class LocalPrefill:
    """The line of such prompts. `chunk_tokens` bounds the rows of a forward; `cost` learns from each, and
    tells how many of them take `stall_s`, which running sequences wait for more than the least."""

    def __init__(
        self,
        model: ModelRunner,
        chunk_tokens: int,
        cost: TokenCost | None = None,
        stall_s: float = LEAST_STALL_S,
    ) -> None:
        self._model = model
        self._chunk_tokens = chunk_tokens
        self._stall_s = stall_s or LEAST_STALL_S
        self._cost = cost or TokenCost()
        self._sampler = Sampler()
        self._line: dict[DecodeSequence, _Place] = {}  # as they came
        self._is_turn_of_late = False

    def __len__(self) -> int:
        return len(self._line)

    def join(self, sequence: DecodeSequence) -> None:
        self._line[sequence] = _Place(sequence.num_left)

    def leave(self, is_gone: Callable[[DecodeSequence], bool]) -> list[DecodeSequence]:
        """Take out the sequences that nobody waits for."""
        gone = [sequence for sequence in self._line if is_gone(sequence)]
        for sequence in gone:
            del self._line[sequence]
        return gone

    def next(self, *, is_alone: bool, num_cores: int = 1) -> dict[DecodeSequence, SequenceRows]:
        """The rows of the next forward; `is_alone` where no sequence waits for its next token."""
        self._cost.num_cores = num_cores
        chosen, room = {}, self._room(is_alone)
        for sequence in self._in_turn():
            if room <= 0:
                break
            chosen[sequence] = self._rows(sequence, min(sequence.num_left, room))
            room -= len(chosen[sequence].token_ids)
        return chosen

    def step(self, chosen: dict[DecodeSequence, SequenceRows]) -> list[tuple[DecodeSequence, Advance]]:
        """One forward over these; those that are complete, each with its first token."""
        began_s = time.monotonic()
        logits = self._model.forward(self._model.batch(list(chosen.values())))
        num_tokens = sum(len(rows.token_ids) for rows in chosen.values())
        self._cost.observe(num_tokens, time.monotonic() - began_s)
        for sequence, rows in chosen.items():
            sequence.num_computed += len(rows.token_ids)
        complete = [sequence for sequence in chosen if not sequence.num_left]
        self.leave(lambda sequence: sequence in complete)
        with span("sample"):
            sampled = self._sampler.sample(logits, [sequence.sampling for sequence in complete])
        for sequence in complete:
            sequence.num_computed -= 1  # `advance` counts the last token, whose successor it brings
        return list(zip(complete, map(advance_by, complete, sampled), strict=True))

    def _in_turn(self) -> list[DecodeSequence]:
        """By what they have left; every second time behind the oldest of those who are late."""
        now_s = time.monotonic()
        line = sorted(self._line, key=lambda sequence: sequence.num_left)
        late = (each for each, place in self._line.items() if self._is_late(each, place, now_s))
        self._is_turn_of_late = not self._is_turn_of_late
        if self._is_turn_of_late and (oldest := next(late, None)) is not None:
            line.remove(oldest)
            line.insert(0, oldest)
        return line

    def _is_late(self, sequence: DecodeSequence, place: _Place, now_s: float) -> bool:
        num_computed = place.num_tokens - sequence.num_left
        return self._cost.is_patience_over(now_s - place.since_s, place.num_tokens, num_computed)

    def _room(self, is_alone: bool) -> int:
        if is_alone:
            return self._chunk_tokens
        return self._cost.tokens_within(self._stall_s, LEAST_CHUNK_TOKENS, self._chunk_tokens)

    @staticmethod
    def _rows(sequence: DecodeSequence, num_tokens: int) -> SequenceRows:
        start, end = sequence.num_computed, sequence.num_computed + num_tokens
        return SequenceRows(
            token_ids=sequence.token_ids[start:end],
            start=start,
            block_table=sequence.blocks,
            num_logits=1 if end == len(sequence.token_ids) else 0,
        )
