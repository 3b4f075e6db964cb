"""`tandem eval`: experiments of speculation and quantization on real but tiny checkpoints."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.eval import gamma, qspec, quantization, quantized_pairs, speculation
from bench.speculation.formula import StepCosts
from tests.bench.eval.files import written


def test_speculation_tables(settings, tmp_path) -> None:
    found = speculation.run(settings)
    rows = found.tables["rows"]
    cells = {(row.sampling, row.k, row.tau) for row in rows}
    assert cells == {(s, *cell) for s in ("greedy", "sampled") for cell in speculation.CELLS}
    for row in rows:
        assert row.samples == 2
        assert row.ms_per_token == pytest.approx(1e3 / row.tokens_per_s)
        assert row.identical is (True if row.sampling == "greedy" else None)
        assert 0 <= row.acceptance_rate <= row.alpha <= 1
    assert any(row.rollbacks > 0 for row in rows)
    plain = [row for row in rows if row.k == 0]
    assert all((row.speedup.low, row.speedup.high) == (1, 1) for row in plain)
    (line,) = [row for row in found.sheets[0].rows if row[:3] == ("greedy", "0.2", "3")]
    assert line[-2:] == ("1.35x, 61%", "1.11x, 67%")
    assert written(speculation, settings, found, tmp_path) >= {"speculation.csv", "speculation-speedup.png"}


def test_quantized_pairs(settings, tmp_path) -> None:
    found = quantized_pairs.run(settings)
    rows = {quantized_pairs.name_of(row): row for row in found.tables["rows"]}
    assert set(rows) == {*quantized_pairs.SETUPS, "16-bit target alone", "8-bit target alone"}
    assert (rows["16-bit target alone"].speedup.median, rows["16-bit target alone"].identical) == (1, True)
    for name, row in rows.items():
        assert row.identical is (None if "8-bit target" in name or "both" in name[:10] else True), name
    (line,) = [row for row in found.sheets[0].rows if row[0] == "8-bit target, 4-bit draft"]
    assert line[-2:] == ("0.72x, 54%", "0.56x, 63%")
    assert "quantized-pairs-speedup.png" in written(quantized_pairs, settings, found, tmp_path)


def test_quantization_alone(settings, tmp_path) -> None:
    found = quantization.run(settings)
    rows = {row.precision: row for row in found.tables["rows"]}
    assert list(rows) == ["none", "int8", "nf4", "int4"]
    assert (rows["none"].agreement, rows["none"].speedup.median) == (1, 1)
    assert rows["none"].perplexity != rows["nf4"].perplexity
    assert rows["int8"].agreement > rows["nf4"].agreement
    assert "windows of 512" in found.remarks[1]
    assert "quantization-perplexity.png" in written(quantization, settings, found, tmp_path)


def test_the_gamma_study(settings, texts, tmp_path) -> None:
    other = tmp_path / "upper.txt"
    other.write_text(texts.read_text().upper())
    chosen = replace(settings, texts=(texts, other))
    found = gamma.run(chosen)
    rows = found.tables["rows"]
    assert [(r.source, r.gamma) for r in rows] == [(s, g) for s in ("letters", "upper") for g in (2, 3, 5, 7)]
    for row in rows:
        assert row.omega == pytest.approx(sum(row.alpha**i for i in range(row.gamma + 1)))
        cost = (row.gamma * row.draft_ms + row.verify_ms) / row.target_ms
        assert row.expected_speedup == pytest.approx(row.omega / cost)
        assert row.expected_ms_per_token == pytest.approx(row.target_ms * cost / row.omega)
    assert found.sheets[1].rows[0] == ("2", "0.52x, α 68.5%", "0.52x, α 75.2%", "0.52x, α 70.0%")
    assert "gamma-speedup.png" in written(gamma, chosen, found, tmp_path)


@given(st.floats(0, 1), st.floats(0.01, 1), st.floats(0, 1))
def test_the_recommended_gamma_is_the_fastest_or_none(alpha, draft, extra) -> None:
    """By the formula written out: time of γ drafts and γ + 1 rows, for 1 + α + … + α^γ tokens."""
    costs = {g: StepCosts(draft, 1.0, 1.0 + extra * g) for g in gamma.CANDIDATES}

    def speed(g: int) -> float:
        return sum(alpha**i for i in range(g + 1)) / (g * draft + 1 + extra * g)

    best = gamma.recommended(alpha, costs)
    assert max(speed(best), 1) == pytest.approx(max(1, *(speed(g) for g in costs)))


def test_qspec_tables(settings, tmp_path) -> None:
    found = qspec.run(replace(settings, rounds=1))
    rows = found.tables["rows"]
    methods = ["QSpec, W4A4 drafts (emulated)", "QSpec, W4A8 drafts", "W4A4 alone (emulated)", "W4A8 alone"]
    assert [(r.batch, r.method) for r in rows] == [(b, m) for b in (8, 16, 32) for m in ("W4A16", *methods)]
    for row in rows:
        if row.method.startswith("QSpec"):
            assert row.identical
            assert 0 < row.draft_share + row.verify_share < 1
        else:
            assert row.acceptance_rate is None
    assert not all(row.identical for row in rows if row.method == methods[2])
    accepted = {(row.draft, row.gamma): row.acceptance_rate for row in found.tables["acceptance"]}
    assert set(accepted) == {(d, g) for d in ("W4A4 (emulated)", "W4A8") for g in range(2, 8)}
    assert accepted["W4A8", 3] > accepted["W4A4 (emulated)", 3]
    fidelity = {row.method: row for row in found.tables["fidelity"]}
    assert (fidelity["16-bit"].agreement_16_bit, fidelity["W4A16"].agreement) == (1, 1)
    assert fidelity["W4A8 alone"].agreement > fidelity["W4A4 alone (emulated)"].agreement
    assert {"qspec-fidelity.csv", "qspec-speed.png"} <= written(qspec, settings, found, tmp_path)


def test_nothing_is_begun_when_the_time_is_over(settings) -> None:
    found = speculation.run(replace(settings, deadline_s=0.0))
    assert found.tables["rows"] == []
    assert found.remarks[-1] == "Not measured, as there was no time left: greedy, sampled."
