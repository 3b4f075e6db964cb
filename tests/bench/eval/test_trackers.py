"""Findings go to trackers that the user has."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.eval import speculation
from bench.eval.decoding import Row
from bench.eval.experiment import Findings, Settings
from bench.eval.report import Report
from bench.eval.trackers import tracker_of
from bench.measure import Sheet, Spread
from tandem.errors import ConfigError


@pytest.fixture
def report() -> Report:
    """Two rows of made-up figures."""
    row = Row(
        "raw", "none", "none", "greedy", 3, 0.2, 4, 100.0, 10.0, 5, 0.5, 0.6, Spread(1, 1, 1), 0.5, True
    )
    found = Findings({"rows": [row, replace(row, tokens_per_s=90.0)]}, [Sheet("t", ("a",), [("one",)], 1)])
    return Report(speculation, Settings(), found, "tandem eval speculation")


def test_findings_go_to_tensorboard(report, tmp_path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracker_of(f"tensorboard:{tmp_path}")(report)
    events = accumulators.EventAccumulator(str(tmp_path / "speculation")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("rows/tokens_per_s")] == [(0, 100), (1, 90)]
    assert "| one |" in events.Tensors("speculation/text_summary")[0].tensor_proto.string_val[0].decode()


def test_findings_go_to_weights_and_biases(report, tmp_path, monkeypatch) -> None:
    pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    tracker_of("wandb:tandem")(report)
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/table/rows_*.json"))


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("mlflow:x", "must be tensorboard:DIR or wandb:PROJECT"),
        ("wandb:", "must be tensorboard:DIR or wandb:PROJECT"),
        ("wandb:project", "needs wandb: pip install wandb"),
    ],
)
def test_other_trackers_are_refused(place, why, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=why):
        tracker_of(place)
