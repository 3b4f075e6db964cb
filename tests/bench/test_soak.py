"""The soak: its verdict on made-up samples, its mix, and a short run against real processes."""

from __future__ import annotations

import csv
import json
import mmap
import os
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.measure import Spread
from bench.soak import __main__ as soak
from bench.soak import watch
from bench.soak.load import CANCELLED, ENDED, LATE, Load
from bench.soak.verdict import MIB, Sample, judge
from tandem.errors import Internal
from tests.checkpoints import tiny_llama

EVEN = Spread(1.0, 0.9, 1.1)


def samples(growth_mib=0.0, early_mib=0.0):
    """Twenty of a run of 10,000; memory grows per 1,000 requests."""
    return [
        Sample(
            done,
            {"decode-0": int(MIB * (100 + growth_mib * done / 1000 + (early_mib if done > 1000 else 0)))},
            0.01,
        )
        for done in range(500, 10_500, 500)
    ]


@given(st.floats(-5, 5))
def test_the_slope_is_that_of_memory_after_the_warm_up(growth):
    verdict = judge(samples(growth, early_mib=50), EVEN, [], [])
    assert verdict.mib_per_1000["decode-0"] == pytest.approx(growth, abs=1e-3)


@pytest.mark.parametrize(
    ("found", "ratio", "owned", "failures", "flat"),
    [
        (samples(0.9), EVEN, [], [], True),
        (samples(1.1), EVEN, [], [], False),
        (samples(), Spread(1.05, 0.9, 2.0), [], [], True),
        (samples(), Spread(1.06, 0.9, 2.0), [], [], False),
        (samples(), Spread(0.7, 0.6, 0.8), [], [], True),
        (samples(), EVEN, ["blocks: 1"], [], False),
        (samples(), EVEN, [], ["request 7 failed"], False),
    ],
)
def test_what_counts_as_flat(found, ratio, owned, failures, flat):
    assert judge(found, ratio, owned, failures).is_flat is flat


def test_too_few_samples_are_no_verdict():
    with pytest.raises(ValueError, match="two samples after its warm-up"):
        judge(samples()[:1], EVEN, [], [])


def test_memory_of_a_process_is_seen():
    before = watch.resident_bytes(os.getpid())
    with mmap.mmap(-1, 64 * MIB) as kept:  # new pages for certain: a freed heap would be used again
        kept.write(b"x" * len(kept))
        assert watch.resident_bytes(os.getpid()) - before > 0.9 * len(kept)


async def test_an_unexpected_error_is_kept_with_its_request():
    class Broken:
        async def generate(self, *args, **kwargs):
            raise Internal("INTERNAL", "broken on purpose")

    load = Load(Broken())
    await load.run([2])  # several completions
    assert load.outcomes == Counter({("several", "failed"): 1})
    assert "request 2 (several)" in load.failures[0]


@pytest.mark.e2e
@pytest.mark.slow
def test_a_short_soak_of_real_processes(tmp_path, monkeypatch, capsys):
    """All kinds come to their ends, the books are empty, and every process is watched."""
    monkeypatch.setattr(watch, "PROBES", 1)
    monkeypatch.setattr(watch, "ROUNDS", 2)
    monkeypatch.setattr(soak, "FRESH_REQUESTS", 7)
    settings = soak.SETTINGS | {
        "model": {"path": str(tiny_llama())},
        "speculation": {"draft": "ngram"},
    }
    verdict = soak.run(60, tmp_path, settings)
    assert verdict.owned == []
    assert verdict.failures == []
    assert set(verdict.mib_per_1000) == {"supervisor", "router", "prefill-0", "decode-0"}
    document = json.loads((tmp_path / "soak.json").read_text())
    found = {(row["kind"], row["outcome"]): row["requests"] for row in document["outcomes"]}
    assert sum(found.values()) == 60
    assert {outcome for _, outcome in found} <= {ENDED, CANCELLED, LATE}
    assert found["cancelled", CANCELLED] > 0
    with (tmp_path / "soak.csv").open() as file:
        assert [int(row["requests"]) for row in csv.DictReader(file)] == list(range(3, 63, 3))
    assert 0 < verdict.step_ratio.low <= verdict.step_ratio.high == document["step_ratio"]["high"]
    shown = capsys.readouterr().out
    assert "MiB per 1,000 requests" in shown
    assert "in turns: " in shown
