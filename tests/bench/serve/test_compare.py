"""Comparing runs: chance is not a change, a change is found, and the command says so with its exit code."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from bench.serve import report
from bench.serve.compare import compare
from bench.serve.metrics import Slo, summarize
from bench.serve.record import Outcome, RequestRecord
from bench.serve.session import Options, Run
from tandem.errors import ConfigError
from tests.command import tandem

SLO = Slo(ttft_ms=150)


def document(
    draw: int, *, factor: float = 1.0, count: int = 80, noise: float = 0.1, failures: int = 0, **more
):
    """Requests whose latencies differ from each other a lot, and between runs by `noise` and `factor`."""
    sizes, rng = random.Random(1), random.Random(draw)
    records = []
    for index in range(count):
        first_s = sizes.lognormvariate(-2.5, 1) * factor * rng.lognormvariate(0, noise)
        arrivals = [(index + first_s * (1 + n / 10), 1) for n in range(10)]
        outcome = Outcome.FAILED if index < failures else Outcome.OK
        records.append(
            RequestRecord(
                index, index, index, 5, 10, arrivals, arrivals[-1][0], outcome, "", 10, digest=str(index)
            )
        )
    options = Options(num_requests=count, slo=SLO, **more)
    return report.document(Run(records, summarize(records, SLO, [])), options, "somewhere", "model")


def verdicts(a, b, margin: float = 0.05) -> dict[str, str]:
    return {change.figure: change.verdict for change in compare(a, b, margin).changes}


def test_pairs_show_a_change_that_two_samples_hide() -> None:
    a, b = document(1), document(2, factor=1.2)
    assert compare(a, b, 0.05).is_paired
    assert verdicts(a, b)["ttft_ms"] == "worse"
    assert verdicts(b, a)["ttft_ms"] == "better"
    other = document(2, factor=1.2, seed=5)
    assert not compare(a, other, 0.05).is_paired
    assert verdicts(a, other)["ttft_ms"] == "same"
    assert verdicts(a, document(2, factor=5, seed=5))["ttft_ms"] == "worse"


def test_the_change_and_its_interval_are_those_that_were_made() -> None:
    [ttft, *_] = compare(document(1), document(2, factor=1.2), 0.05).changes
    assert ttft.low < 0.2 < ttft.high
    assert ttft.change == pytest.approx(0.2, abs=0.04)
    assert ttft.high - ttft.low < 0.12


@pytest.mark.slow
@pytest.mark.parametrize("is_paired", [True, False])
def test_chance_is_called_a_change_as_rarely_as_stated(is_paired: bool) -> None:
    """No change, no margin: of 95 % intervals one in twenty excludes zero, on either side."""
    wrong = 0
    for seed in range(60):
        b = document(1000 + seed, **({} if is_paired else {"seed": 9}))
        wrong += verdicts(document(seed), b, 0.0)["ttft_ms"] != "same"
    assert wrong <= 10  # P(more | 5 %) < 1e-4


def test_failures_count_against_the_limits_and_texts_are_compared() -> None:
    a, b = document(1, noise=0), document(2, noise=0, failures=30)
    b["records"][50]["digest"] = "another"
    found = compare(a, b, 0.05)
    assert {change.figure: change.verdict for change in found.changes}["outside_limits"] == "worse"
    assert found.same_texts == pytest.approx(49 / 50)
    assert found.is_worse
    with pytest.raises(ConfigError, match="at least 20 requests"):
        compare(a, document(1, count=19), 0.05)


def test_the_commands(tmp_path: Path) -> None:
    for name, content in (("a", document(1)), ("b", document(2, factor=1.5))):
        report.save(tmp_path / name, content)
    worse = tandem("compare", tmp_path / "a", tmp_path / "b", "--json")
    assert worse.returncode == 1, worse.stderr
    assert json.loads(worse.stdout)["is_worse"]
    shown = tandem("compare", tmp_path / "b", tmp_path / "a")
    assert shown.returncode == 0, shown.stderr
    assert "better" in shown.stdout
    assert "request by request" in shown.stdout
    refused = tandem("compare", tmp_path / "a", tmp_path / "none")
    assert refused.returncode == 2
    assert "is no load test's result" in refused.stderr

    page = tmp_path / "a" / "serve.html"
    before = page.read_text()
    page.unlink()
    assert tandem("report", tmp_path / "a").returncode == 0
    assert page.read_text() == before
