"""From options to a run: what to send, when, to whom, what is measured, and the search for the most it holds.

1. The workload and its schedule are fixed before anything is sent.
2. A warm-up of a few requests is sent and forgotten.
3. The run: every request by its time, whatever became of those before it.
4. With a search, runs at other rates follow, each several times with other seeds.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.measure import Meter
from bench.serve.arrivals import Arrival, Schedule
from bench.serve.conversation import RequestClass, Talk, chained, first_turns, of_classes, synthetic
from bench.serve.driver import Cancelling, Driver
from bench.serve.metrics import Slo, summarize
from bench.serve.record import Outcome, RequestRecord
from bench.serve.scrape import Scraper
from bench.serve.search import Found, Trial, always, search
from bench.serve.slo import Slos
from bench.serve.target import Target
from bench.serve.workload import (
    Lengths,
    LoadRequest,
    Synthetic,
    is_sharegpt,
    read_sharegpt,
    read_workload,
)
from tandem.errors import ConfigError

WARM_UP_SEED = 987_654


@dataclass(frozen=True, slots=True)
class Options:
    """Everything that decides what is sent and when. Two runs with equal options send the same."""

    num_requests: int = 100
    arrival: Schedule = field(default_factory=lambda: Schedule(Arrival.CLOSED))
    concurrency: int = 8  # of the closed loop
    input: Path | None = None  # synthetic prompts without one
    input_lengths: str = "128"
    output_lengths: str = "64"
    max_tokens: int = 128  # of lines in a file that say nothing of it
    prefix_share: float = 0.0
    num_prefixes: int = 1
    cancelling: Cancelling = field(default_factory=Cancelling)
    slo: Slo = field(default_factory=Slo)  # of classes that have none of their own
    class_slos: tuple[tuple[str, Slo], ...] = ()
    classes: tuple[RequestClass, ...] = ()  # of synthetic requests
    turns: str = "1"  # of a conversation
    think_s: float = 1.0  # between turns, on average
    warm_up: int = 4
    seed: int = 0
    trials: int = 3  # at each rate of a search
    attainment: float = 0.9  # share of requests that must meet the limits in a search

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        values["arrival"]["kind"] = self.arrival.kind.value
        values["input"] = str(self.input) if self.input else None
        values["class_slos"] = dict(values["class_slos"])
        return values

    @property
    def limits(self) -> Slos:
        return Slos(self.slo, dict(self.class_slos))

    @property
    def talk(self) -> Talk:
        return Talk(Lengths(self.turns), self.think_s)


@dataclass(frozen=True, slots=True)
class Model:
    """What prompts must fit into."""

    name: str
    vocab_size: int
    max_context: int


@dataclass(frozen=True, slots=True)
class Run:
    """One finished run."""

    records: list[RequestRecord]
    summary: dict[str, Any]
    scraper: Scraper | None = None  # with what the server said meanwhile
    num_requests: int = 0  # that were to be sent: a run that was stopped has fewer records


Runs = dict[tuple[float, int], Run]  # by rate and number of the trial


@dataclass(slots=True)
class _Misses:
    """Counts requests outside the limits, and says when they are too many for the rate to hold.

    That is when even trials without any other could not make up for them.
    """

    options: Options
    num_requests: int
    count: int = 0

    def __call__(self, record: RequestRecord) -> bool:
        if record.outcome is not Outcome.CANCELLED and not self.options.limits.is_met(record):
            self.count += 1
        return not self.are_too_many

    @property
    def are_too_many(self) -> bool:
        return self.count > (1 - self.options.attainment) * self.options.trials * self.num_requests + 1e-9

    @property
    def attainment(self) -> float:
        """At most this share can have met them."""
        return 1 - self.count / self.num_requests


class LoadTest:
    """One target under the load of one set of options."""

    def __init__(
        self,
        target: Target,
        model: Model,
        options: Options,
        scraping: Callable[[], Scraper] | None = None,
    ) -> None:
        """`scraping` makes what reads the server's metrics during the run."""
        self._target = target
        self._scraping = scraping
        self._model = model
        self.options = options
        if options.arrival.kind is Arrival.TRACE and options.input is None:
            raise ConfigError("--arrival trace needs a trace file as --input")

    def at_rate(self, rate: float) -> LoadTest:
        """The same test with Poisson arrivals at this rate."""
        arrival = Schedule(Arrival.POISSON, rate)
        return LoadTest(self._target, self._model, replace(self.options, arrival=arrival), self._scraping)

    async def run(self) -> Run:
        """Warm up, then run once."""
        await self.warm_up()
        options = self.options
        requests = self._requests(options.num_requests, options.seed)
        with Meter("load test", _num_turns(requests)) as meter:

            def note(record: RequestRecord) -> bool:
                meter.step()
                return True

            return await self._once(requests, self._times(requests), options.seed, note)

    async def search(self) -> Found:
        """`search_rates` of this target, warmed up once. Raises `ConfigError` without limits."""
        if self.options.limits == Slos():
            raise ConfigError("a search for the most goodput needs a limit, such as --slo ttft=500ms")
        await self.warm_up()
        return await search_rates(self.options, self.trial, {})

    async def trial(self, rate: float, number: int) -> Run:
        """One run at a Poisson rate; it is stopped if that can hold no more."""
        seed = self.options.seed + number
        requests = self._requests(self.options.num_requests, seed)
        times = Schedule(Arrival.POISSON, rate).times(len(requests), seed)
        return await self._once(requests, times, seed, _Misses(self.options, _num_turns(requests)))

    async def _once(
        self,
        requests: Sequence[LoadRequest],
        times: Sequence[float] | None,
        seed: int,
        note: Callable[[RequestRecord], bool],
    ) -> Run:
        """`note` hears of each record and says whether the run may go on."""

        def on_end(record: RequestRecord) -> None:
            if not note(record):
                driver.stop()

        scraper = self._scraping() if self._scraping else None
        driver = Driver(self._target, self.options.cancelling, seed, on_end, scraper)
        records = await driver.run(requests, times, self.options.concurrency)
        lags_ms, limits = driver.loop_lags_ms, self.options.limits
        summary = summarize(records, limits, lags_ms, is_closed=times is None)
        summary["cut"] = sum(request.is_cut for request in requests)
        return Run(records, summary, scraper, _num_turns(requests))

    async def warm_up(self) -> None:
        """A few requests whose times are forgotten."""
        requests = [replace(one, then=None) for one in self._requests(self.options.warm_up, WARM_UP_SEED)]
        await Driver(self._target).run(requests, None, 2)

    def _requests(self, count: int, seed: int) -> list[LoadRequest]:
        options, model = self.options, self._model
        if options.input is not None:
            return first_turns(self._of_file(options.input), count)
        made = Synthetic(
            Lengths(options.input_lengths),
            Lengths(options.output_lengths),
            model.vocab_size,
            model.max_context,
            options.prefix_share,
            options.num_prefixes,
        )
        if options.classes:
            return of_classes(made, options.classes, options.talk, count, seed)
        return synthetic(made, options.talk, count, seed)

    def _of_file(self, file: Path) -> list[LoadRequest]:
        options, model = self.options, self._model
        if options.talk.is_one:
            found = read_workload(file, model.vocab_size, model.max_context, options.max_tokens)
        elif is_sharegpt(file):
            rng = random.Random(f"{options.seed}/turns")
            found = [
                chained(turns[: options.talk.turns.draw(rng)], options.talk, rng, f"{options.seed}-{number}")
                for number, turns in enumerate(read_sharegpt(file, model.max_context))
            ]
        else:
            raise ConfigError(f"{file} has no conversations: --turns needs ShareGPT JSON or no --input")
        if not found:
            raise ConfigError(f"{file} has no requests")
        return found

    def _times(self, requests: Sequence[LoadRequest]) -> list[float] | None:
        schedule = self.options.arrival
        match schedule.kind:
            case Arrival.CLOSED:
                return None
            case Arrival.TRACE:
                if any(request.at_s is None for request in requests):
                    raise ConfigError(f"{self.options.input} has no timestamps; take another --arrival")
                return [request.at_s or 0.0 for request in requests]
            case _:
                return schedule.times(len(requests), self.options.seed)


async def search_rates(
    options: Options,
    run: Callable[[float, int], Awaitable[Run]],
    known: Runs,
    has_time: Callable[[], bool] = always,
    name: str = "",
) -> Found:
    """The highest Poisson rate at which enough requests meet the limits.

    `known` are runs of before, with equal options but for the limits: none of them is repeated, and new ones
    are added. One that was stopped says nothing of looser limits, so the loosest are searched first. `name`
    stands before what is said of each run.
    """
    say = Console(stderr=True, highlight=False).print

    async def trial(rate: float, number: int) -> Trial:
        if (rate, number) not in known:
            known[rate, number] = await run(rate, number)
        judged = _judged(options, rate, known[rate, number])
        so_far = ", stopped" if judged.stopped else ""
        share = f"{100 * judged.attainment:.0f} % within the limits{so_far}"
        say(f"{name}{rate:.2f} requests/s, trial {number + 1}: {share}")
        return judged

    return await search(trial, options.arrival.rate, options.attainment, options.trials, has_time)


def _judged(options: Options, rate: float, run: Run) -> Trial:
    """What a run was by the limits of now."""
    misses = _Misses(options, run.num_requests)
    for record in run.records:
        misses(record)
    found = summarize(run.records, options.limits, ())
    return Trial(
        rate=rate,
        attainment=misses.attainment if misses.are_too_many else found["attainment"] or 0.0,
        goodput_rps=found["goodput_rps"] or 0.0,
        client_bottleneck=found["client_bottleneck"],
        most_in_flight=found["most_in_flight"],
        stopped=misses.are_too_many,
        errors=found["errors"],
    )


def _num_turns(requests: Sequence[LoadRequest]) -> int:
    return sum(request.num_turns for request in requests)
