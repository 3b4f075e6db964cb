"""The figures of a short scenario, counted by hand."""

from __future__ import annotations

import timeit
from itertools import pairwise

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tandem.errors import Cancelled, DeadlineExceeded, Overloaded
from tandem.metrics import SECONDS, RouterMetrics
from tandem.request import Timings, Usage


def samples(metrics: RouterMetrics) -> dict[tuple[str, ...], float]:
    """(name, label values…) → value, as a scraper reads it."""
    families = text_string_to_metric_families(metrics.exposition().decode())
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def scenario() -> RouterMetrics:
    """Two completions, one of which speculates and is planned twice; one refusal and one late request."""
    metrics = RouterMetrics()
    metrics.note_admitted()
    metrics.note_tokens(1, 0.030, first=True)
    metrics.note_tokens(1, 0.010, first=False)
    metrics.note_finished("stop", Usage(prompt=7, completion=2), Timings(prefill_ms=30, total_ms=40))
    metrics.note_admitted()
    metrics.note_tokens(1, 0.150, first=True)
    metrics.note_admitted(again=True)
    metrics.note_tokens(4, 0.012, first=False)
    timings = Timings(queue_ms=100, prefill_ms=50, decode_ms=12, total_ms=162)
    metrics.note_finished("length", Usage(prompt=3, completion=5), timings)
    metrics.note_refused(Overloaded("QUEUE_FULL", "full"))
    metrics.note_admitted()
    metrics.note_failed(DeadlineExceeded("decode"))
    return metrics


def test_a_scenario_counted_by_hand():
    seen = samples(scenario())

    assert seen["tandem_admission_decisions_total", "admitted", ""] == 4
    assert seen["tandem_admission_decisions_total", "refused", "QUEUE_FULL"] == 1
    assert seen["tandem_replans_total",] == 1
    assert seen["tandem_requests_total", "stop"] == seen["tandem_requests_total", "length"] == 1
    assert seen["tandem_requests_total", "DEADLINE_DECODE"] == 1
    assert (seen["tandem_prompt_tokens_total",], seen["tandem_output_tokens_total",]) == (10, 7)
    assert seen["tandem_token_deliveries_total",] == 4
    assert seen["tandem_time_to_first_token_seconds_count",] == 2
    assert seen["tandem_time_to_first_token_seconds_sum",] == pytest.approx(0.180)
    assert seen["tandem_time_to_first_token_seconds_bucket", "0.05"] == 1
    assert seen["tandem_time_to_first_token_seconds_bucket", "0.2"] == 2
    assert seen["tandem_inter_token_latency_seconds_count",] == 2
    assert seen["tandem_inter_token_latency_seconds_sum",] == pytest.approx(0.022)
    assert seen["tandem_e2e_request_latency_seconds_sum",] == pytest.approx(0.202)


def test_the_stages_sum_to_the_whole():
    seen = samples(scenario())
    stages = [value for name, value in seen.items() if name[0] == "tandem_request_stage_seconds_sum"]
    assert len(stages) == 7
    assert sum(stages) == pytest.approx(0.030 + 0.162)


def test_buckets_are_log_spaced_from_a_millisecond_to_two_minutes():
    assert (SECONDS[0], SECONDS[-1]) == (0.001, 120)
    assert all(1 < high / low <= 2.51 for low, high in pairwise(SECONDS))


def test_refusals_are_counted_and_go_on():
    metrics = RouterMetrics()
    with pytest.raises(Cancelled), metrics.refusals():
        raise Cancelled
    assert samples(metrics)["tandem_admission_decisions_total", "refused", "CLIENT_CANCELLED"] == 1


def test_an_update_costs_microseconds():
    metrics = RouterMetrics()
    per_call_s = min(timeit.repeat(lambda: metrics.note_tokens(2, 0.02, first=False), number=2000, repeat=5))
    assert per_call_s / 2000 < 50e-6


def test_names_are_prometheus_names():
    for line in scenario().exposition().decode().splitlines():
        name = line.split()[2] if line.startswith("#") else line.partition("{")[0].split()[0]
        assert name.startswith("tandem_"), line
        assert ":" not in name
        assert not name.endswith("_created"), line
