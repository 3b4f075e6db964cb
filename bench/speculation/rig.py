"""A decode worker's engine and decoders without the worker: prompts in, tokens and their cost out.

The loop is the worker's own (decode_worker/worker.py) without queue, KV transfer and streams.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

from bench.inflate import Pair
from bench.measure import dtype_on
from bench.speculation.text import Tokens, batches
from decode_worker.decoder import Advance, Decoder, PlainDecoder
from decode_worker.drafting import make_decoder
from decode_worker.sequence import DecodeSequence
from decode_worker.speculative import SpeculativeDecoder
from kvstore.key import KvHandle
from tandem.config import ClusterConfig, ModelConfig, SpeculationConfig
from tandem.draft_checkpoint import usable_draft
from tandem.engine.batch import SequenceRows
from tandem.engine.loading import load_engine
from tandem.engine.work_state import sampling_state
from tandem.geometry import ModelGeometry, num_blocks
from tandem.profiling.spans import span
from tandem.quantizations import AUTO
from tandem.sampling import SamplingParams
from tandem.speculation import MAX_ASSISTANT_TOKENS, SpeculationParams
from tandem.tokenizer import Tokenizer
from tandem.work import Work

NO_HANDLE = KvHandle(
    object_id=bytes(16), epoch=0, store_epoch=0, num_bytes=1, num_tokens=1, fingerprint=bytes(32)
)
FAR_OFF_S = 1e6
SCRATCH_BLOCKS = 16  # in front of everybody's: measuring costs writes to the first blocks
BLOCK_SIZE = 16
FALLBACK_K = 3  # for requests that ask for no number
EXACT = SpeculationParams()


@dataclass(frozen=True, slots=True)
class Setup:
    """What is loaded: which draft, and the precision of both."""

    draft: str = "model"  # none | ngram | model | self | qspec
    draft_precision: str = "none"  # a quantization, of the target's weights for a self-draft, or auto
    target_precision: str = "none"
    activation_bits: int = 0  # of a draft by the target's own weights; 0: the faster of 8 and 16

    @property
    def label(self) -> str:
        parts = [f"draft {self.draft}"]
        if self.draft_precision not in ("none", AUTO):
            parts.append(self.draft_precision)
        elif self.draft == "model" and self.draft_precision == "none":
            parts.append("as stored")
        if self.target_precision != "none":
            parts.append(f"target {self.target_precision}")
        if self.activation_bits:
            parts.append(f"{self.activation_bits}-bit activations")
        return " ".join(parts)

    def config(self, pair: Pair, device: str = "cpu") -> ClusterConfig:
        """Raises `ConfigError` for what does not go together."""
        return ClusterConfig(
            model=ModelConfig(
                path=pair.target,
                quantization=self.target_precision,
                device=device,
                dtype=dtype_on(device),
            ),
            speculation=SpeculationConfig(
                draft=self.draft,
                draft_path=pair.draft if self.draft == "model" else None,
                draft_quantization=self.draft_precision,
                draft_activation_bits=self.activation_bits,
            ),
        )


@dataclass(slots=True)
class Run:
    """What decoding some prompts brought and cost. Acceptance is counted before stops cut the output."""

    outputs: list[Tokens] = field(default_factory=list)
    seconds: float = 0.0
    num_steps: int = 0  # of a sequence: one row of it was verified, and its draft tokens
    num_drafted: int = 0
    num_accepted: int = 0
    num_rollbacks: int = 0  # steps of a sequence in which a draft token was rejected
    num_tau_stops: int = 0
    draft_s: float = 0.0
    verify_s: float = 0.0

    @classmethod
    def total(cls, runs: Sequence[Run]) -> Run:
        """Of runs that are all of one kind: their outputs in a row, their counts and times added up."""
        whole = cls()
        for run in runs:
            for name in (count.name for count in fields(cls)):
                setattr(whole, name, getattr(whole, name) + getattr(run, name))
        return whole

    @property
    def num_tokens(self) -> int:
        return sum(len(output) for output in self.outputs)

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted tokens, as transformers and vLLM count: it falls with k."""
        return self.num_accepted / max(self.num_drafted, 1)

    @property
    def alpha(self) -> float:
        """Accepted over judged tokens, up to and including the first rejected one: what formulas mean."""
        return self.num_accepted / max(self.num_accepted + self.num_rollbacks, 1)

    @property
    def mean_accepted_length(self) -> float:
        """Accepted draft tokens per step of a sequence."""
        return self.num_accepted / max(self.num_steps, 1)

    def count(self, advances: Sequence[Advance]) -> None:
        self.num_steps += len(advances)
        for advance in advances:
            self.num_drafted += advance.num_drafted
            self.num_accepted += advance.num_accepted
            self.num_rollbacks += advance.num_accepted < advance.num_drafted
            self.num_tau_stops += advance.is_tau_stop


class Rig:
    """A loaded pair with room for `max_sequences` of `max_tokens`. Raises `ConfigError` as loading does."""

    def __init__(
        self,
        pair: Pair,
        setup: Setup,
        max_sequences: int,
        max_tokens: int,
        threads: int,
        device: str = "cpu",
    ) -> None:
        self._config = setup.config(pair, device)
        self.threads, self.device = threads, device
        draft = usable_draft(self._config)
        self._blocks_each = num_blocks(max_tokens + MAX_ASSISTANT_TOKENS, BLOCK_SIZE)
        wanted = SCRATCH_BLOCKS + max_sequences * self._blocks_each
        self.engine = load_engine(self._config, "bench", self._bytes_of(pair, wanted), threads, draft)
        self.plain = PlainDecoder(self.engine.model.called("decode"))
        self.constant = self._decoder(FALLBACK_K)  # drafts as many tokens as a request asks for
        self._tokenizer = Tokenizer.from_dir(pair.target)

    def _bytes_of(self, pair: Pair, blocks: int) -> int:
        """A KV budget that holds that many blocks, whatever drafts."""
        dtype = self._config.kv_dtypes.decode
        return blocks * sum(ModelGeometry.from_path(path).block_bytes(BLOCK_SIZE, dtype) for path in pair)

    def auto(self) -> Decoder:
        """Speculative, with as many draft tokens as pay; it knows nothing yet.

        Costs are measured here, and overwrite no sequence's KV.
        """
        return self._decoder(0)

    def _decoder(self, k: int) -> Decoder:
        return make_decoder(replace(self._config.speculation, num_assistant_tokens=k), self.engine)

    def prefill(self, prompts: Sequence[Tokens]) -> None:
        """Compute the KV of prompts and the logits behind each, in forwards as large as a prefill worker's.

        Decoding starts with each prompt's last token: it writes the same KV to the same place once more.
        """
        model = self.engine.model.called("prefill")
        together = max(1, self._config.prefill.token_budget // max(map(len, prompts)))
        for first, some in enumerate(batches(prompts, together)):
            tables = map(self._table, itertools.count(first * together))
            rows = [SequenceRows(prompt, 0, table) for prompt, table in zip(some, tables, strict=False)]
            model.forward(model.batch(rows))

    def run(
        self,
        decoder: Decoder,
        prompts: Sequence[Tokens],
        batch: int,
        sampling: SamplingParams,
        speculation: SpeculationParams = EXACT,
    ) -> Run:
        """Decode prompts that were prefilled in this order, `batch` at a time; as one ends, another joins."""
        work = [self._sequence(i, prompt, sampling, speculation) for i, prompt in enumerate(prompts)]
        run, before = Run(), _phases(decoder)
        began_s = time.perf_counter()
        _decode(decoder, work, batch, run)
        run.seconds = time.perf_counter() - began_s
        after = _phases(decoder)
        run.draft_s, run.verify_s = after.draft_s - before.draft_s, after.verify_s - before.verify_s
        run.outputs = [tuple(s.token_ids[s.work.num_prompt_tokens :]) for s in work]
        return run

    def outputs(self, prompts: Sequence[Tokens], batch: int, sampling: SamplingParams) -> list[Tokens]:
        """What the target alone writes after each prompt."""
        found: list[Tokens] = []
        for some in batches(prompts, batch):
            self.prefill(some)
            found += self.run(self.plain, some, batch, sampling).outputs
        return found

    def _table(self, index: int) -> range:
        first = SCRATCH_BLOCKS + index * self._blocks_each
        return range(first, first + self._blocks_each)

    def _sequence(
        self, index: int, prompt: Tokens, sampling: SamplingParams, speculation: SpeculationParams
    ) -> DecodeSequence:
        work = Work(
            request_id=f"prompt-{index}",
            epoch=1,
            token_ids=prompt,
            num_prompt_tokens=len(prompt),
            sampling=replace(sampling, seed=index),
            deadline_s=time.monotonic() + FAR_OFF_S,
            fingerprint=bytes(32),
            speculation=speculation,
        )
        return DecodeSequence(
            work,
            NO_HANDLE,
            emit=_to_nobody,
            output=work.output_stream(self._tokenizer, ()),
            sampling=sampling_state(work, self.engine.model),
            blocks=list(self._table(index)),
        )


def _to_nobody(news: Any) -> None:
    """Nobody listens."""


class _Phases(NamedTuple):
    """Time that a decoder has spent so far."""

    draft_s: float
    verify_s: float


def _phases(decoder: Decoder) -> _Phases:
    """A plain decoder does not tell."""
    if not isinstance(decoder, SpeculativeDecoder):
        return _Phases(0.0, 0.0)
    return _Phases(decoder.stats.draft_s, decoder.stats.verify_s)


def _decode(decoder: Decoder, work: Sequence[DecodeSequence], batch: int, run: Run) -> None:
    """Until all have ended; each leaves as it does."""
    waiting = deque(work)
    running: list[DecodeSequence] = []
    while waiting or running:
        while waiting and len(running) < batch:
            running.append(waiting.popleft())
        with span("decode step"):
            advances = decoder.step(running)
            run.count(advances)
            for sequence, advance in zip(running, advances, strict=True):
                _take(sequence, advance)
            decoder.settle(running)
        for sequence in running:
            if sequence.is_finished:
                decoder.leave(sequence)
        running = [sequence for sequence in running if not sequence.is_finished]


def _take(sequence: DecodeSequence, advance: Advance) -> None:
    if advance.is_bad:
        raise FloatingPointError("the model gave no usable distribution")
    for token in advance.tokens:
        sequence.advance(token.token_id)
        if sequence.output.take(token.token_id)[1] is not None:
            sequence.is_finished = True
            return
