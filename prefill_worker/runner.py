"""Computes chunks of prompts in one forward and samples the first token of those that are complete.

Where a draft model's KV is computed here too, it reads the same chunks. A draft that fails costs its KV,
never a prompt.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from prefill_worker.job import PrefillJob
from tandem.engine.batch import SequenceRows
from tandem.engine.cores import Cores, OwnCores
from tandem.engine.decoder import Batch
from tandem.engine.model_runner import ModelRunner
from tandem.engine.sampler import BadLogits, SampledToken, Sampler
from tandem.engine.work_state import sampling_state
from tandem.profiling.spans import span, traced
from tandem.token_cost import TokenCost

log = logging.getLogger(__name__)

CHUNK_S = 0.25  # about so long a chunk may take,
LEAST_TOKENS = 256  # unless that is fewer: each forward reads all of the weights again


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `num_tokens` tokens of a prompt."""

    job: PrefillJob
    num_tokens: int

    @property
    def is_last(self) -> bool:
        return self.num_tokens == self.job.num_left


@dataclass(slots=True)
class PrefillStats:
    """What padding and waiting cost so far."""

    num_batches: int = 0
    num_prompts: int = 0
    num_tokens: int = 0
    num_padded_rows: int = 0  # attention rows computed for nothing
    compute_s: float = 0.0
    queue_s: float = 0.0  # summed over prompts: arrival until the first chunk starts


class PrefillRunner:
    """Owns nothing but the way from chunks to first tokens."""

    def __init__(
        self,
        model: ModelRunner,
        token_budget: int,
        draft: ModelRunner | None = None,
        cores: Cores | None = None,
    ) -> None:
        self._model = model
        self._cores = cores or OwnCores(1)
        self._token_budget = token_budget
        self._draft = draft
        self._sampler = Sampler()
        self.stats = PrefillStats()
        self.cost = TokenCost()

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a long prompt's next chunk, which whoever comes while it is computed has to wait for."""
        return self.cost.tokens_within(CHUNK_S, LEAST_TOKENS, self._token_budget)

    def is_late(self, job: PrefillJob) -> bool:
        """Whether a long prompt has let others by for as long as it may."""
        waited_s = time.monotonic() - job.arrived_s
        return self.cost.is_patience_over(waited_s, job.num_tokens, job.num_computed)

    def run(self, chunks: Sequence[Chunk]) -> list[SampledToken | BadLogits | None]:
        """Compute the chunks; one sampled token for each that completes its prompt, else None."""
        self.cost.num_cores = self._cores.num_cores
        started_s = time.monotonic()
        batch = self._model.batch([self._rows(chunk) for chunk in chunks])
        logits = self._model.forward(batch)
        compute_s = time.monotonic() - started_s
        self.stats.compute_s += compute_s
        self.cost.observe(sum(chunk.num_tokens for chunk in chunks), compute_s)
        if self._draft is not None:
            self._read_for_draft(self._draft, chunks)
        for chunk in chunks:
            chunk.job.num_computed += chunk.num_tokens
        self._count(batch, chunks)
        complete = [chunk for chunk in chunks if chunk.job.num_left == 0]
        with span("sample"):
            states = [sampling_state(chunk.job.work, self._model) for chunk in complete]
            tokens = iter(self._sampler.sample(logits, states))
        return [next(tokens) if chunk.job.num_left == 0 else None for chunk in chunks]

    @traced("draft")
    def _read_for_draft(self, draft: ModelRunner, chunks: Sequence[Chunk]) -> None:
        following = [chunk for chunk in chunks if chunk.job.has_draft_kv]
        if not following:
            return
        try:
            draft.forward(draft.batch([self._rows(chunk)._replace(num_logits=0) for chunk in following]))
        except Exception:  # whatever a draft does, prompts go on
            log.exception("the draft could not read %d prompts", len(following))
            for chunk in following:
                chunk.job.has_draft_kv = False

    @staticmethod
    def _rows(chunk: Chunk) -> SequenceRows:
        job = chunk.job
        end = job.num_computed + chunk.num_tokens
        return SequenceRows(
            token_ids=job.work.token_ids[job.num_computed : end],
            start=job.num_computed,
            block_table=job.blocks,
            num_logits=1 if chunk.is_last else 0,
        )

    def _count(self, batch: Batch, chunks: Sequence[Chunk]) -> None:
        self.stats.num_batches += 1
        self.stats.num_prompts += sum(chunk.job.num_left == 0 for chunk in chunks)
        self.stats.num_tokens += sum(chunk.num_tokens for chunk in chunks)
        self.stats.num_padded_rows += batch.padded_rows
