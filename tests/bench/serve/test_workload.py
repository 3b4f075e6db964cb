"""What is sent and when: files of each format, lengths, arrivals."""

from __future__ import annotations

import itertools
import json
import random
import statistics
from pathlib import Path

import pytest

from bench.serve.arrivals import Arrival, Schedule, arrival_named
from bench.serve.search import Trial, search
from bench.serve.workload import Lengths, LoadRequest, Synthetic, read_workload
from tandem.errors import ConfigError

VOCAB, CONTEXT = 1000, 2048


def read(path: Path, content: str) -> list[LoadRequest]:
    path.write_text(content)
    return read_workload(path, VOCAB, CONTEXT, 32)


def test_equal_blocks_of_a_mooncake_trace_are_equal_tokens(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 1000, "input_length": 1100, "output_length": 50, "hash_ids": [5, 6, 7]},
        {"timestamp": 3500, "input_length": 1030, "output_length": 9, "hash_ids": [5, 6, 8]},
        {"timestamp": 4000, "input_length": 600, "output_length": 0, "hash_ids": [1]},
        {"timestamp": 4000, "input_length": 9000, "output_length": 9000, "hash_ids": list(range(18))},
    ]
    first, second, third, long = read(tmp_path / "trace.jsonl", "\n".join(map(json.dumps, rows)))
    assert [r.at_s for r in (first, second, third)] == [0.0, 2.5, 3.0]
    assert [len(r.prompt) for r in (first, second, third)] == [1100, 1030, 600]
    assert [r.max_tokens for r in (first, second, third)] == [50, 9, 1]
    assert first.prompt[:1024] == second.prompt[:1024]
    assert first.prompt[1024:1030] != second.prompt[1024:1030]
    assert len(long.prompt) + long.max_tokens == CONTEXT
    assert [r.is_cut for r in (first, second, third, long)] == [False, False, False, True]
    assert all(0 <= token < VOCAB for token in first.prompt)
    assert read_workload(tmp_path / "trace.jsonl", VOCAB, CONTEXT, 32)[0] == first


def test_the_first_turns_of_sharegpt(tmp_path: Path) -> None:
    entries = [
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "x" * 40}]},
        {"conversations": [{"from": "human", "value": "alone"}]},
        {"conversations": []},
    ]
    for text in (json.dumps(entries), json.dumps(entries, indent=1)):
        assert read(tmp_path / "sharegpt.json", text) == [LoadRequest("Hi", 10, None, False)]


def test_request_files_and_plain_text(tmp_path: Path) -> None:
    body = {"prompt": "x", "max_tokens": 5, "ignore_eos": True}
    batch = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    found = read(tmp_path / "r.jsonl", json.dumps(batch) + '\n{"token_ids": [1, 2]}\n')
    assert found == [LoadRequest("x", 5, None, True), LoadRequest([1, 2], 32, None, False)]
    assert read(tmp_path / "r.txt", "one\n\ntwo\n") == [
        LoadRequest("one", 32, None, False),
        LoadRequest("two", 32, None, False),
    ]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"prompt": "x"}\n{"prompt": \n', "r:2: not valid JSON"),
        ('{"messages": []}\n', "r:1: load tests take prompts, not chats"),
        ('[{"conversation": 1}]', "is not ShareGPT JSON"),
        ('{"timestamp": 1, "hash_ids": [1]}\n', "r:1: not a Mooncake trace line"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, content: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read(tmp_path / "r", content)


def test_synthetic_prompts_share_their_beginnings_and_fit_the_context() -> None:
    made = Synthetic(Lengths("uniform:50-3000"), Lengths("64"), VOCAB, CONTEXT, 0.5, 3)
    requests = made.requests(200, seed=1)
    assert requests == made.requests(200, seed=1) != made.requests(200, seed=2)
    assert all(len(r.prompt) + r.max_tokens <= CONTEXT for r in requests)
    assert len({tuple(r.prompt[:25]) for r in requests}) == 3
    assert len({tuple(r.prompt) for r in requests}) == 200


def test_lengths() -> None:
    rng = random.Random(0)
    assert {Lengths("7").draw(rng) for _ in range(9)} == {7}
    assert {Lengths("uniform:3-5").draw(rng) for _ in range(99)} == {3, 4, 5}
    drawn = [Lengths("lognormal:200,0.5").draw(rng) for _ in range(2000)]
    assert statistics.median(drawn) == pytest.approx(200, rel=0.1)
    drawn = [Lengths("mix:5*9,70").draw(rng) for _ in range(2000)]
    assert drawn.count(5) == pytest.approx(1800, abs=80)
    assert drawn.count(70) == 2000 - drawn.count(5)
    for text in ("mix:", "mix:1*x", "many", "uniform:5", "normal:1,2", "uniform:9-3"):
        with pytest.raises(ConfigError, match="lengths must be like"):
            Lengths(text).draw(rng)


@pytest.mark.parametrize(
    ("schedule", "variation"),
    [
        (Schedule(Arrival.CONSTANT, 50), 0.0),
        (Schedule(Arrival.POISSON, 50), 1.0),
        (Schedule(Arrival.GAMMA, 50, burstiness=0.25), 2.0),
        (Schedule(Arrival.GAMMA, 50, burstiness=4), 0.5),
    ],
)
def test_gaps_have_the_mean_and_the_variation_of_their_kind(schedule: Schedule, variation: float) -> None:
    times = schedule.times(20_000, seed=3)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert times[0] == 0
    assert min(gaps) >= 0
    assert statistics.fmean(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(variation, rel=0.06, abs=1e-6)
    assert times == schedule.times(20_000, seed=3)


def test_ramps_and_bursts() -> None:
    times = Schedule(Arrival.RAMP, 10, ramp_to=100).times(1001, 0)
    assert times[1] - times[0] == pytest.approx(1 / 10)
    assert times[-1] - times[-2] == pytest.approx(1 / 100, rel=0.01)
    assert Schedule(Arrival.BURST).times(3, 0) == [0, 0, 0]
    with pytest.raises(ConfigError, match="rate must be more than 0"):
        Schedule(Arrival.POISSON, 0)
    with pytest.raises(ConfigError, match="arrival must be one of closed, burst"):
        arrival_named("sometimes")


@pytest.mark.parametrize("first_rate", [0.5, 3.0, 40.0])
async def test_a_search_brackets_the_rate_at_which_a_service_breaks(first_rate: float) -> None:
    async def run(rate: float, number: int) -> Trial:
        attainment = (1.0 if rate < 7 else 0.5) + 0.01 * number
        return Trial(rate, attainment, rate * attainment, False, 2)

    found = await search(run, first_rate, 0.9, 3)
    assert found.holding_rate < 7 <= found.failing_rate
    assert found.failing_rate / found.holding_rate < 1.11
    assert found.goodput_ci[0] < found.goodput_rps < found.goodput_ci[1]
    assert found.goodput_rps == pytest.approx(1.01 * found.holding_rate)


async def test_a_search_without_an_end_says_so() -> None:
    async def always(rate: float, number: int) -> Trial:
        return Trial(rate, 1.0, rate, True, 9)

    found = await search(always, 1.0, 0.9, 1)
    assert found.failing_rate is None


async def test_a_search_without_time_has_a_wider_bracket() -> None:
    async def run(rate: float, number: int) -> Trial:
        ran.append(rate)
        return Trial(rate, 1.0 if rate < 7 else 0.5, rate, False, 2)

    for num_rates, wanted in ((1, (1, None)), (3, (4, None)), (4, (4, 8)), (5, (32**0.5, 8))):
        ran: list[float] = []
        found = await search(run, 1.0, 0.9, 1, lambda ran=ran, most=num_rates: len(ran) < most)
        assert (found.holding_rate, found.failing_rate) == wanted


async def test_a_rate_that_cannot_hold_any_more_is_left() -> None:
    ran = []

    async def run(rate: float, number: int) -> Trial:
        ran.append((rate, number))
        return Trial(rate, 1.0 if rate < 3 else 0.6, rate, False, 2)

    await search(run, 2.0, 0.9, 3)
    assert ran[:4] == [(2.0, 0), (2.0, 1), (2.0, 2), (4.0, 0)]  # 0.6 and two perfect ones are 0.87
    assert (4.0, 1) not in ran


async def test_what_fails_alone_is_not_searched_for_below() -> None:
    rates = []

    async def never(rate: float, number: int) -> Trial:
        rates.append(rate)
        return Trial(rate, 0.0, 0.0, False, most_in_flight=3 if rate > 2 else 1)

    found = await search(never, 8.0, 0.9, 1)
    assert rates == [8, 4, 2]
    assert (found.holding_rate, found.failing_rate, found.goodput_rps) == (None, 2, 0)
