"""All experiments in one go: their time, their page, and what cannot be measured."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from bench.eval import charts, decoding, suite
from bench.eval.attempt import attempt
from bench.eval.catalog import MODULES, experiment
from bench.eval.experiment import Chart, Series
from bench.measure import Meter
from deploy.commands.eval import command_line
from deploy.eval_app import HELP, experiments
from tandem.errors import ConfigError


def test_what_cannot_be_measured_is_said(settings) -> None:
    def measure(what):
        if what == 2:
            raise ConfigError("no kernel")
        return [what]

    with Meter("any", 1) as meter:
        wanted = {"a": 1, "b": 2, "c": 3}
        assert attempt(wanted, measure, settings, meter) == ([1, 3], ["Not measured: b: no kernel."])
        rows, remarks = attempt(wanted, measure, replace(settings, deadline_s=0), meter)
    assert not rows
    assert remarks == ["Not measured, as there was no time left: a, b, c."]


def test_charts_without_values_are_not_drawn(tmp_path) -> None:
    empty = Chart("none", "t", "x", "y", [Series("s", (), ())])
    bars = Chart("bars", "t", "x", "y", [Series("s", ("a b", "c"), (1, 2))], is_bars=True)
    assert [file.name for file in charts.draw(tmp_path, "any", [empty, bars])] == ["any-bars.png"]


def test_every_experiment_is_a_command() -> None:
    assert list(HELP) == list(MODULES)
    for name in MODULES:
        assert name == experiment(name).NAME


def test_all_of_them_in_one_go(pair, texts, tmp_path, monkeypatch) -> None:
    """Every experiment but the split, whose services take long to start, and what cannot be measured."""
    monkeypatch.setattr(decoding, "OUTPUT_TOKENS", 72)
    monkeypatch.setattr(suite, "MODULES", ("quantization", "gamma"))
    page, out = tmp_path / "docs" / "results.md", tmp_path / "out"
    command = ["all", "--target", str(pair.target), "--text", str(texts), "--samples", "2", "--rounds", "1"]
    options = ["--threads", "1", "--out", str(out), "--page", str(page), "--json"]
    done = CliRunner().invoke(experiments, command + options)
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout.splitlines()[-1])
    assert list(document) == ["quantization"]
    text = page.read_text()
    assert "Not measured: γ study" in text
    assert "name a --draft beside --target" in text
    assert f"tandem eval quantization --target {pair.target} --text {texts} --samples 2 --rounds 1" in text
    assert (out / "quantization.csv").exists()
    assert all(f"{name} " in text for name in ("Python", *suite.PACKAGES))


def test_time_that_is_left_goes_to_later_experiments() -> None:
    assert set(suite.WEIGHTS) == set(MODULES)
    left = 1.0
    for name in MODULES:
        share = suite.share_of(name)
        assert 0 < share <= 1
        assert share * left == pytest.approx(suite.WEIGHTS[name] / sum(suite.WEIGHTS.values()))
        left -= share * left
    assert left == pytest.approx(0)


def test_the_page_is_part_of_a_checkouts_documentation(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(suite, "CHECKOUT", tmp_path)
    assert suite.default_page(tmp_path / "out") == tmp_path / "out" / "results.md"
    (tmp_path / "pyproject.toml").touch()
    assert suite.default_page(tmp_path / "out") == tmp_path / "docs" / "results.md"


@pytest.mark.parametrize("where", [["--out", "/somewhere"], ["--out=/somewhere", "--page", "p.md"]])
def test_a_page_does_not_say_where_its_files_went(monkeypatch, where) -> None:
    monkeypatch.setattr("sys.argv", ["tandem", "eval", "all", *where, "--minutes", "10", "--no-plots"])
    assert command_line() == "tandem eval all --minutes 10 --no-plots"
