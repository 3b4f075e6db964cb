"""Conversations, classes and their limits: what is sent, when, and how it is judged."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from bench.serve import report
from bench.serve.arrivals import Arrival, Schedule
from bench.serve.conversation import RequestClass, Talk, of_classes, parse_class, synthetic
from bench.serve.driver import NOT_SENT, Driver
from bench.serve.metrics import Slo, summarize
from bench.serve.record import Outcome
from bench.serve.search import Found
from bench.serve.session import LoadTest, Model, Options, search_rates
from bench.serve.slo import Slos, parse_slos
from bench.serve.target import GrpcTarget, Reply, SendError
from bench.serve.workload import Lengths, LoadRequest, Synthetic, read_sharegpt, read_workload
from router.ask import SESSION_HEADER
from tandem import client
from tandem.errors import ConfigError
from tests.bench.serve.test_metrics import record
from tests.e2e.harness import config, quiesce, running

MADE = Synthetic(Lengths("20"), Lengths("4"), 1000, 200, 0.5, 1)


class Answering:
    """Answers at once with tokens that name the request; refuses what it is told to."""

    def __init__(self, refused: int | None = None) -> None:
        self.sent: list[LoadRequest] = []
        self.refused = refused

    async def send(self, request: LoadRequest, reply: Reply) -> None:
        self.sent.append(request)
        if len(self.sent) - 1 == self.refused:
            raise SendError("QUEUE_FULL")
        reply.note(2, f"<{len(self.sent)}>")
        reply.token_ids += [900 + len(self.sent)] * 2

    async def close(self) -> None: ...


def turns_of(request: LoadRequest | None) -> list[LoadRequest]:
    found = []
    while request is not None:
        found.append(request)
        request = request.then
    return found


def test_synthetic_conversations_fit_the_context_and_count_as_their_turns() -> None:
    talks = synthetic(MADE, Talk(Lengths("uniform:2-5"), 0.5), 60, seed=3)
    assert talks == synthetic(MADE, Talk(Lengths("uniform:2-5"), 0.5), 60, seed=3)
    assert sum(talk.num_turns for talk in talks) == 60
    assert {talk.num_turns for talk in talks} >= {2, 3, 4, 5}
    assert len({talk.session for talk in talks}) == len(talks)
    assert len({tuple(talk.prompt[:10]) for talk in talks}) == 1
    assert len({tuple(turn.prompt) for talk in talks for turn in turns_of(talk)}) == 60
    assert all(talk.think_s == 0 and talk.then.think_s > 0 for talk in talks if talk.then)
    (long,) = synthetic(MADE, Talk(Lengths("9")), 9, 0)[:1]
    assert long.num_turns == 200 // 24
    single = synthetic(MADE, Talk(Lengths("1")), 5, 0)
    assert single == MADE.requests(5, 0)


@pytest.mark.parametrize("closed", [True, False])
async def test_a_turn_brings_all_before_it_after_a_pause(closed: bool) -> None:
    last = LoadRequest([5], 2, session="s", think_s=0.05)
    talk = LoadRequest([1, 2], 2, session="s", then=replace(last, prompt=[3, 4], then=last))
    other = LoadRequest("Hi", 2, session="t", then=LoadRequest(" Bye", 2, session="t"))
    target = Answering()
    records = await Driver(target).run([talk, other], None if closed else [0.0, 0.5])
    assert [one.prompt for one in target.sent] == [
        *([1, 2], [1, 2, 901, 901, 3, 4], [1, 2, 901, 901, 3, 4, 902, 902, 5]),
        *("Hi", "Hi<4> Bye"),
    ]
    assert [(one.index, one.session, one.turn) for one in records] == [
        *((0, "s", 0), (1, "s", 1), (2, "s", 2)),
        *((3, "t", 0), (4, "t", 1)),
    ]
    assert records[1].scheduled_s == pytest.approx(records[0].end_s + 0.05)
    assert records[1].sent_s >= records[1].scheduled_s


async def test_turns_after_a_failure_are_failures() -> None:
    talk = LoadRequest([1], 2, then=LoadRequest([2], 2, then=LoadRequest([3], 2)))
    records = await Driver(Answering(refused=1)).run([talk], [0.0])
    assert [one.outcome for one in records] == [Outcome.OK, Outcome.FAILED, Outcome.FAILED]
    assert [one.error for one in records] == ["", "QUEUE_FULL", NOT_SENT]
    assert summarize(records, Slo(), [])["attainment"] == pytest.approx(1 / 3, abs=1e-4)


class Hanging(Answering):
    """Answers every second request and keeps the others waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.num_cancelled = 0

    async def send(self, request: LoadRequest, reply: Reply) -> None:
        await super().send(request, reply)
        if len(self.sent) % 2:
            return
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise


async def test_a_stopped_run_sends_no_more_and_waits_for_nothing() -> None:
    target, seen = Hanging(), []

    def on_end(record) -> None:
        seen.append(record)
        if len(seen) == 3:
            driver.stop()

    driver = Driver(target, on_end=on_end)
    records = await driver.run([LoadRequest([1], 2)] * 50, [0.02 * n for n in range(50)])
    assert records == seen
    assert (len(records), len(target.sent), target.num_cancelled) == (3, 5, 2)


async def test_a_search_stops_a_trial_that_cannot_hold_its_rate() -> None:
    """Nobody is answered within a microsecond, so with one in ten allowed the second miss of ten decides."""
    options = Options(
        num_requests=10, arrival=Schedule(Arrival.POISSON, 50), slo=Slo(e2e_ms=0.001), trials=1, warm_up=0
    )
    target = Answering()
    found = await LoadTest(target, Model("m", 1000, 2048), options).search()
    assert found.holding_rate is None
    assert all(trial.stopped and trial.attainment == 0.8 for trial in found.trials)
    assert len(target.sent) < 5 * len(found.trials)


async def test_requests_that_the_model_has_no_room_for_are_counted(tmp_path: Path, capsys) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 0, "input_length": length, "output_length": 2, "hash_ids": [1]} for length in (5, 500)
    ]
    trace.write_text("\n".join(map(json.dumps, rows)))
    options = Options(num_requests=2, input=trace, arrival=Schedule(Arrival.TRACE), warm_up=0)
    run = await LoadTest(Answering(), Model("m", 1000, 100), options).run()
    content = report.document(run, options, "somewhere", "m")
    report.save(tmp_path, content)
    report.show(content, Console())
    assert "1 requests were cut to the model's context" in (tmp_path / "serve.html").read_text()
    assert "1 requests were cut to the model's context" in capsys.readouterr().out


async def test_a_search_repeats_no_run_that_is_known(monkeypatch) -> None:
    """What ran within looser limits is judged anew by tighter ones, without being sent again."""
    monkeypatch.setattr("bench.serve.search.MAX_DOUBLINGS", 2)
    target, known = Answering(), {}
    arrival = Schedule(Arrival.POISSON, 50)
    loose = Options(num_requests=10, arrival=arrival, slo=Slo(e2e_ms=60_000), trials=1, warm_up=0)

    async def searched(options: Options) -> Found:
        return await search_rates(options, LoadTest(target, Model("m", 1000, 2048), options).trial, known)

    first = await searched(loose)
    num_sent = len(target.sent)
    assert (first.holding_rate, num_sent) == (50 * 2**2, 10 * 3)
    assert await searched(loose) == first
    tight = replace(loose, slo=Slo(e2e_ms=0.001))
    second = await searched(tight)
    assert second.trials[0].stopped
    assert len(target.sent) - num_sent == sum(len(known[t.rate, 0].records) for t in second.trials[1:])


def test_the_turns_of_sharegpt(tmp_path: Path) -> None:
    told = ["Hi", "x" * 40, "More?", "y" * 8, "", "z"]
    entry = {"conversations": [{"from": "any", "value": text} for text in told]}
    file = tmp_path / "sharegpt.json"
    file.write_text(json.dumps([entry, {"conversations": [{"value": "alone"}]}]))
    (turns,) = read_sharegpt(file, 2048)
    assert [(turn.prompt, turn.max_tokens) for turn in turns] == [("Hi", 10), ("More?", 2)]
    assert [len(turns) for turns in read_sharegpt(file, 12)] == [1]
    options = Options(input=file, turns="9", think_s=0.0, warm_up=0)
    run = asyncio.run(LoadTest(Answering(), Model("m", 1000, 2048), options).run())
    assert [one.turn for one in run.records] == [0, 1]
    lines = tmp_path / "lines.txt"
    lines.write_text("one\n")
    with pytest.raises(ConfigError, match="has no conversations"):
        asyncio.run(LoadTest(Answering(), Model("m", 9, 9), replace(options, input=lines)).run())


def test_classes_have_their_shares_and_lengths() -> None:
    classes = [
        parse_class("chat:share=3,input=uniform:16-32,output=8"),
        parse_class("batch:share=1,input=60,output=2"),
    ]
    made = of_classes(MADE, classes, Talk(Lengths("1")), 100, 1)
    assert Counter(one.request_class for one in made) == {"chat": 75, "batch": 25}
    assert {len(one.prompt) for one in made if one.request_class == "batch"} == {60}
    assert {one.max_tokens for one in made if one.request_class == "chat"} == {8}
    assert [one.request_class for one in made[:75]].count("batch") > 5  # in random order
    talks = of_classes(MADE, classes, Talk(Lengths("2"), 0), 100, 1)
    assert all(turn.request_class == talk.request_class for talk in talks for turn in turns_of(talk))
    assert parse_class("x:share=1,input=lognormal:256,0.6,output=1") == RequestClass(
        "x", 1, "lognormal:256,0.6", "1"
    )
    for text in ("x", "x:share=0,input=1,output=1", ":share=1,input=1,output=1", "x:share=1,input=1"):
        with pytest.raises(ConfigError, match="classes are like"):
            parse_class(text)


def test_classes_of_a_file(tmp_path: Path) -> None:
    body = {"prompt": "x", "metadata": {"class": "batch"}}
    batch = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    file = tmp_path / "r.jsonl"
    file.write_text(f'{{"prompt": "x", "class": "chat"}}\n{json.dumps(batch)}\n{{"prompt": "x"}}\n')
    assert [one.request_class for one in read_workload(file, 9, 99, 9)] == ["chat", "batch", ""]


def test_each_class_has_its_own_limits() -> None:
    slos = parse_slos(["ttft=100ms", "chat:ttft=0.2s,itl=50ms", "batch:e2e=30s", "e2e=900ms"])
    assert slos == Slos(
        Slo(ttft_ms=100, e2e_ms=900), {"chat": Slo(ttft_ms=200, itl_ms=50), "batch": Slo(e2e_ms=30_000)}
    )
    for text in ("ttft", "chat:ttft=5", "chat:speed=5ms", "chat:", "ttft=-1ms", "ttft=1h"):
        with pytest.raises(ConfigError, match="limits are like"):
            parse_slos([text])
    arrivals = [(0.15, 1), (0.19, 1)]
    chat = record(0, 0, 0, arrivals, 0.2, request_class="chat")
    other = record(1, 0, 0, arrivals, 0.2)
    batch = record(2, 0, 0, arrivals, 2.0, request_class="batch")
    failed = record(3, 0, 0, [], 1.0, Outcome.FAILED, request_class="batch")
    found = summarize([chat, other, batch, failed], slos, [])
    assert (found["attainment"], found["goodput_rps"]) == (0.5, 1.0)
    classes = found["classes"]
    assert {name: (one["requests"], one["ok"], one["attainment"]) for name, one in classes.items()} == {
        "": (1, 1, 0.0),
        "batch": (2, 1, 0.5),
        "chat": (1, 1, 1.0),
    }
    assert classes["chat"]["goodput_rps"] == 0.5  # one in two seconds
    assert classes["batch"]["ttft_ms"]["count"] == 1
    assert summarize([other], slos, [])["classes"] == {}


@pytest.mark.e2e
async def test_a_session_stays_on_its_workers_and_computes_only_what_is_new() -> None:
    """The session's name and its growing prompt over the wire, to two prefill workers."""
    assert client.SESSION_HEADER == SESSION_HEADER
    settings = config(
        cache={"prefix_bytes": 4 << 20},
        kvstore={"publish": "all", "prefix_tokens": 32},
        router={"policy": "session"},
    )
    options = Options(
        num_requests=12,
        arrival=Schedule(Arrival.BURST),
        input_lengths="40",
        output_lengths="24",
        turns="4",
        think_s=0.05,
        warm_up=0,
    )

    class Settled(GrpcTarget):
        async def send(self, request: LoadRequest, reply: Reply) -> None:
            await super().send(request, reply)
            await quiesce(cluster, within_s=30)  # answers are kept in the background

    async with running(settings, num_prefill=2) as cluster:
        target = Settled(cluster.address)
        try:
            run = await LoadTest(target, Model(*await target.facts()), options).run()
        finally:
            await target.close()
    assert run.summary["ok"] == 12, run.summary["errors_by_reason"]
    prompts = {one.turn: one.prompt_tokens for one in run.records}
    assert prompts == {0: 40, 1: 104, 2: 168, 3: 232}
    assert all(one.cached_tokens >= 32 for one in run.records if one.turn)
    assert all(one.cached_tokens == 0 for one in run.records if not one.turn)
    assert run.summary["cached_share"] > 0.4
