"""What /metrics says of the router's state, read when somebody scrapes and never before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.admission import Admission
from router.dispatch import Dispatcher
from router.registry import Registry, WorkerState, WorkerView
from tandem.prefix_usage import PrefixReport
from tandem.speculation_usage import SpeculationReport

WORKER = ("worker", "role")
Row = tuple[Sequence[str], float]


class RouterGauges(Collector):
    """Queue, memory by the router's books, and what workers said in their last heartbeat."""

    def __init__(self, dispatcher: Dispatcher, admission: Admission, registry: Registry) -> None:
        self._dispatcher = dispatcher
        self._admission = admission
        self._registry = registry

    def describe(self) -> Iterable[Metric]:
        """Nothing beforehand: the names do not depend on a first scrape."""
        return ()

    def collect(self) -> Iterable[Metric]:
        yield from self._requests()
        yield from self._memory()
        yield from _workers(self._registry.views())

    def _requests(self) -> Iterable[Metric]:
        queue = self._dispatcher.planner.snapshot()
        running = self._dispatcher.num_flights - queue.length
        yield _gauge("requests_waiting", "Completions in the queue.", (), [((), queue.length)])
        yield _gauge("requests_running", "Completions that have their memory.", (), [((), running)])
        oldest = "How long the oldest completion in the queue has waited."
        yield _gauge("queue_oldest_wait_seconds", oldest, (), [((), queue.oldest_wait_s)])

    def _memory(self) -> Iterable[Metric]:
        books = [((o.owner, o.role), o) for o in self._admission.occupancy()]
        reserved = "KV bytes that admission has given out, of each worker and of the store."
        yield _gauge("kv_reserved_bytes", reserved, WORKER, [(of, o.reserved_bytes) for of, o in books])
        capacity = "KV bytes there are, of each worker and of the store."
        yield _gauge("kv_capacity_bytes", capacity, WORKER, [(of, o.capacity_bytes) for of, o in books])


def _workers(views: Sequence[WorkerView]) -> Iterable[Metric]:
    states = Counter((view.info.role.name.lower(), view.state) for view in views)
    roles = sorted({role for role, _ in states})
    rows = [((role, state.value), states[role, state]) for role in roles for state in WorkerState]
    yield _gauge("workers", "Known workers by role and state.", ("role", "state"), rows)
    named = [((view.info.worker_id, view.info.role.name.lower()), view.load) for view in views]
    running = [(of, load.num_running) for of, load in named]
    yield _gauge("worker_requests_running", "In progress, as the worker says.", WORKER, running)
    waiting = [(of, load.num_waiting) for of, load in named]
    yield _gauge("worker_requests_waiting", "Waiting inside the worker, as it says.", WORKER, waiting)
    cores = [(of, load.num_cores) for of, load in named]
    yield _gauge("worker_cores", "Cores that computed the worker's last step, as it says.", WORKER, cores)
    yield from _prefixes([(of, load.prefixes) for of, load in named if load.prefixes])
    yield from _speculation(
        [((view.info.worker_id,), view.load.speculation) for view in views if view.load.speculation]
    )


def _prefixes(reports: Sequence[tuple[Sequence[str], PrefixReport]]) -> Iterable[Metric]:
    """Sums since each worker started; hits over prompts is the hit rate."""

    def counter(name: str, what: str, figure: Callable[[PrefixReport], float]) -> Metric:
        return _counter(f"prefix_{name}", what, WORKER, [(of, figure(report)) for of, report in reports])

    yield counter("prompts", "Prompts whose beginning was looked for.", lambda r: r.num_prompts)
    yield counter("hits", "Prompts of which something was there.", lambda r: r.num_hits)
    tokens = "Prompt tokens restored and not computed; at decode workers, in blocks they had kept."
    yield counter("restored_tokens", tokens, lambda r: r.num_tokens)
    num_bytes = "Bytes of KV restored and not computed; at decode workers, kept and not fetched."
    yield counter("restored_bytes", num_bytes, lambda r: r.num_bytes)
    yield counter("restore_seconds", "Time spent on restoring.", lambda r: r.restore_s)
    yield counter("published_pieces", "Pieces put into the store.", lambda r: r.num_published)
    given_up = "Finished sequences not published: too many, too slow, or their blocks were needed."
    yield counter("given_up", given_up, lambda r: r.num_given_up)
    failures = "Finding, restoring or publishing that the store ended."
    yield counter("failures", failures, lambda r: r.num_failures)
    elsewhere = "Pieces restored from other stores than the worker's own."
    yield counter("elsewhere_pieces", elsewhere, lambda r: r.num_elsewhere)
    index = "Look-ups in the shared prefix index that failed or took too long."
    yield counter("index_failures", index, lambda r: r.index.num_failures)
    refused = "Entries of the shared prefix index that no store wrote: somebody else writes there."
    yield counter("index_refused", refused, lambda r: r.index.num_refused)
    stale = "Pieces that the shared prefix index named and no store had."
    yield counter("index_stale", stale, lambda r: r.index.num_stale)
    saved = "Restored tokens * measured seconds per prefill token - seconds of restoring, all prompts."
    rows = [(of, report.saved_s) for of, report in reports]
    yield _gauge("prefix_saved_seconds", saved, WORKER, rows)


def _speculation(reports: Sequence[tuple[Sequence[str], SpeculationReport]]) -> Iterable[Metric]:
    """Sums since each worker started; a scraper sees a restart as a counter's reset."""

    def rows(figure: Callable[[SpeculationReport], float]) -> list[Row]:
        return [(of, figure(report)) for of, report in reports]

    by = ("worker",)
    yield _counter("spec_draft_tokens", "Draft tokens proposed.", by, rows(lambda r: r.usage.num_drafted))
    accepted = "Draft tokens that the target accepted; over drafted it is the acceptance rate."
    yield _counter("spec_accepted_tokens", accepted, by, rows(lambda r: r.usage.num_accepted))
    rollbacks = "Steps in which a draft token was rejected."
    yield _counter("spec_rollbacks", rollbacks, by, rows(lambda r: r.usage.num_rollbacks))
    yield _counter("spec_failures", "Drafts that raised.", by, rows(lambda r: r.num_failures))
    gain = "Tokens per second of late / those of plain decoding, estimated from measured costs."
    yield _gauge("spec_gain_ratio", gain, by, rows(lambda r: r.gain))
    places: list[Row] = [
        ((*of, str(position)), count)
        for of, report in reports
        for position, count in enumerate(report.usage.accepted_at)
    ]
    at = "Draft tokens accepted at each place of a run, the first one at 0."
    yield _counter("spec_accepted_at_position", at, (*by, "position"), places)


def _gauge(name: str, what: str, labels: Sequence[str], rows: Iterable[Row]) -> Metric:
    return _filled(GaugeMetricFamily(f"tandem_{name}", what, labels=labels), rows)


def _counter(name: str, what: str, labels: Sequence[str], rows: Iterable[Row]) -> Metric:
    return _filled(CounterMetricFamily(f"tandem_{name}", what, labels=labels), rows)


def _filled(
    family: GaugeMetricFamily | CounterMetricFamily, rows: Iterable[Row]
) -> GaugeMetricFamily | CounterMetricFamily:
    for labels, value in rows:
        family.add_metric(labels, value)
    return family
