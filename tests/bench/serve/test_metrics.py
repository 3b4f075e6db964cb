"""Every figure against one computed by hand."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.serve.metrics import Slo, distribution, most_in_flight, percentile, summarize
from bench.serve.record import Outcome, RequestRecord


def record(index: int, scheduled: float, sent: float, arrivals, end: float, outcome=Outcome.OK, **more):
    tokens = sum(count for _, count in arrivals)
    return RequestRecord(
        index, scheduled, sent, arrivals=arrivals, end_s=end, outcome=outcome, output_tokens=tokens, **more
    )


# Sent 20 ms late; first token 100 ms after sending; then 2 tokens, then 1; ends 10 ms after the last.
LATE = record(0, 1.0, 1.02, [(1.12, 1), (1.18, 2), (1.21, 1)], 1.22, prompt_tokens=7, drafted=4, accepted=3)
# On time, one token only: it has no TPOT and no gaps.
SHORT = record(1, 2.0, 2.0, [(2.05, 1)], 2.05, prompt_tokens=3)
FAILED = record(2, 2.5, 2.5, [(2.6, 1)], 3.0, Outcome.FAILED, error="STREAM_BROKEN")
CANCELLED = record(3, 2.5, 2.501, [(2.9, 2)], 2.95, Outcome.CANCELLED)
ALL = [LATE, SHORT, FAILED, CANCELLED]


def test_one_request_by_hand() -> None:
    assert LATE.ttft_ms == pytest.approx(120)
    assert LATE.ttft_sent_ms == pytest.approx(100)
    assert LATE.lag_ms == pytest.approx(20)
    assert LATE.e2e_ms == pytest.approx(220)
    assert LATE.itl_ms == pytest.approx([60, 30])
    assert LATE.tpot_ms == pytest.approx((220 - 120) / 3)
    assert (SHORT.tpot_ms, SHORT.itl_ms) == (None, [])
    assert record(0, 0, 0, [], 1, Outcome.FAILED).ttft_ms is None


def test_a_run_by_hand() -> None:
    found = summarize(ALL, Slo(ttft_ms=110), [1.0, 2.0])
    assert (found["requests"], found["ok"], found["errors"], found["cancelled"]) == (4, 2, 1, 1)
    assert found["duration_s"] == pytest.approx(2.0)  # from the first schedule at 1 to the last end at 3
    assert found["request_rps"] == pytest.approx(2 / 2)
    assert found["output_tokens_per_s"] == pytest.approx((4 + 1 + 1 + 2) / 2)
    assert found["prompt_tokens_per_s"] == pytest.approx(10 / 2)
    assert found["goodput_rps"] == pytest.approx(
        1 / 2
    )  # SHORT alone: LATE took 120 ms, FAILED counts against
    assert found["attainment"] == pytest.approx(1 / 3, abs=1e-4)  # whom we cancelled says nothing
    assert found["ttft_ms"]["p50"] == pytest.approx(50)
    assert found["ttft_ms"]["mean"] == pytest.approx(85)
    assert found["itl_ms"] | {"p50": 30} == {"p50": 30, "p90": None, "p99": None, "mean": 45, "count": 2}
    assert found["tpot_ms"]["count"] == 1
    assert found["tokens_per_arrival"] == pytest.approx(5 / 4)
    assert found["acceptance_rate"] == pytest.approx(3 / 4)
    assert found["most_in_flight"] == 2
    assert found["errors_by_reason"] == {"STREAM_BROKEN": 1}
    assert found["client_bottleneck"]  # 20 ms late to send
    assert not summarize(ALL[1:], Slo(), [99.0] * 9)["client_bottleneck"]
    assert summarize(ALL[1:], Slo(), [99.0] * 9, is_closed=True)["client_bottleneck"]


@pytest.mark.parametrize(
    ("slo", "is_met"),
    [
        (Slo(), True),
        (Slo(ttft_ms=121), True),
        (Slo(ttft_ms=119), False),
        (Slo(itl_ms=61), True),
        (Slo(itl_ms=59), False),
        (Slo(tpot_ms=34), True),
        (Slo(tpot_ms=33), False),
        (Slo(ttft_ms=121, e2e_ms=219), False),
    ],
)
def test_limits(slo: Slo, is_met: bool) -> None:
    assert slo.is_met(LATE) is is_met
    assert not slo.is_met(FAILED)


def test_percentiles_are_refused_below_the_sample_they_need() -> None:
    hundred = [float(value) for value in range(1, 101)]
    random.Random(1).shuffle(hundred)
    assert [percentile(hundred, p) for p in (50, 90, 99)] == [50, 90, 99]
    assert percentile(hundred[:99], 99) is None
    assert percentile(hundred[:9], 90) is None
    assert percentile(hundred[:1], 50) is None
    assert distribution([])["p50"] is None


@given(st.lists(st.floats(0, 1e6), min_size=100, max_size=300), st.sampled_from([50, 90, 99]))
def test_a_percentile_is_a_value_with_that_share_below_it(values, percent) -> None:
    found = percentile(values, percent)
    assert found in values
    assert sum(value <= found for value in values) >= len(values) * percent / 100
    assert sum(value < found for value in values) < len(values) * percent / 100 + 1e-9


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 10)), min_size=1, max_size=30))
def test_most_in_flight_is_what_counting_at_every_start_finds(spans) -> None:
    records = [record(0, begin, begin, [], begin + length) for begin, length in spans]
    slow = max(sum(r.sent_s <= one.sent_s < r.end_s for r in records) for one in records)
    assert most_in_flight(records) == slow


def test_records_survive_json() -> None:
    for one in ALL:
        assert RequestRecord.from_json(one.to_json()) == one
