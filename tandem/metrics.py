"""The router's Prometheus metrics, each with its formula in its help text.

Updates are plain counters and histograms of one process, about a microsecond each. What is a state
rather than an event (memory, queue, workers) is not counted but read when somebody scrapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client import disable_created_metrics as leave_out_created_series
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from tandem.errors import TandemError
from tandem.request import Mark, Timings, Usage
from tandem.token_metrics import TokenMetrics

# 1-2-5 steps from 1 ms to 120 s: the same relative error everywhere.
SECONDS = (*(m * 10.0**e for e in (-3, -2, -1, 0, 1) for m in (1, 2, 5)), 100.0, 120.0)
STAGES = tuple(mark.value.removesuffix("_ms") for mark in Mark)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class RouterMetrics:
    """What happens to requests. Owned by the router's event loop."""

    def __init__(self, itl_limit_s: float = 0.0) -> None:
        leave_out_created_series()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._decisions = self._counter(
            "admission_decisions",
            "Requests by what admission decided: admitted, or refused for a reason of the error contract.",
            labels=("decision", "reason"),
        )
        self._ends = self._counter(
            "requests",
            "Completions that ended, by finish reason (stop, length) or the error's reason.",
            labels=("outcome",),
        )
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of completions that finished.")
        self._placements = self._counter(
            "placements",
            "Attempts by where their prompt is computed (split: on a prefill worker; local: on the decode "
            "worker) and why.",
            labels=("placement", "reason"),
        )
        self._replans = self._counter("replans", "Attempts beyond a request's first.")
        self._repeats = self._counter("repeats", "Requests asked for again under a name that was answered.")
        self._admitted = self._decisions.labels("admitted", "")
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "First token delivered - request received."
        )
        self.tokens = TokenMetrics(SECONDS, itl_limit_s)
        self.add(self.tokens)
        self._total = self._histogram(
            "e2e_request_latency_seconds", "Last token delivered - request received, of those that finished."
        )
        stages = self._histogram(
            "request_stage_seconds",
            "Time a finished completion spent in a stage; the stages sum to the whole.",
            labels=("stage",),
        )
        self._stages = {stage: stages.labels(stage) for stage in STAGES}

    def note_admitted(self, *, again: bool = False) -> None:
        """A request got its memory; `again` for another attempt at it."""
        self._admitted.inc()
        if again:
            self._replans.inc()

    def note_placed(self, placement: str) -> None:
        """It was decided where an attempt's prompt is computed, and why."""
        self._placements.labels(*placement.split("/")).inc()

    def note_refused(self, error: TandemError) -> None:
        """A request ended before it got any memory."""
        self._decisions.labels("refused", error.reason).inc()

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Count whatever error ends this block as a refusal."""
        try:
            yield
        except TandemError as error:
            self.note_refused(error)
            raise

    def note_tokens(self, num_tokens: int, since_s: float, *, first: bool) -> None:
        """Output tokens were passed on: `since_s` after the request came for the first, or after the last."""
        if first:
            self._first_token.observe(since_s)
            self.tokens.note_first(num_tokens)
        else:
            self.tokens.note(num_tokens, since_s)

    def note_finished(self, outcome: str, usage: Usage, timings: Timings) -> None:
        """A completion ended well."""
        self._ends.labels(outcome).inc()
        self._prompt_tokens.inc(usage.prompt)
        self._total.observe(timings.total_ms / 1e3)
        for stage, histogram in self._stages.items():
            histogram.observe(getattr(timings, f"{stage}_ms") / 1e3)

    def note_failed(self, error: TandemError) -> None:
        """A completion ended with an error."""
        self._ends.labels(error.reason).inc()

    def note_repeated(self) -> None:
        """A request is computed again, for whoever lost its answer."""
        self._repeats.inc()

    def add(self, collector: Collector) -> None:
        """Read further figures from `collector` at each scrape."""
        self.registry.register(collector)

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, what: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(f"tandem_{name}", what, labels, registry=self.registry)

    def _histogram(self, name: str, what: str, labels: Sequence[str] = ()) -> Histogram:
        return Histogram(f"tandem_{name}", what, labels, buckets=SECONDS, registry=self.registry)
