"""`tandem bench speculation`: what it counts, compares and writes, on real but tiny checkpoints."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from bench.bundled_pair.corpus import is_held_out
from bench.inflate import BUNDLED, Pair
from bench.measure import Spread
from bench.plotting import require_matplotlib
from bench.speculation import agreement, formula, plots, report, runner, sweep
from bench.speculation.agreement import Corpus, agreements, by_looping, modesty
from bench.speculation.cells import (
    AUTO,
    BATCHES,
    MODEL,
    NGRAM,
    STORED_DRAFT,
    TAU,
    Cell,
    Group,
    K,
    designed,
    everything,
)
from bench.speculation.formula import StepCosts
from bench.speculation.goals import goals
from bench.speculation.precision import measure as measure_quality
from bench.speculation.rig import Rig, Setup
from bench.speculation.runner import Benchmark, Options, Results, small_draft
from bench.speculation.sweep import Row
from bench.speculation.text import held_out, prompts, windows
from tandem.engine.model_runner import ModelRunner
from tandem.errors import ConfigError
from tandem.quantizations import FOUR_BITS
from tandem.sampling import SamplingParams
from tandem.speculation import SpeculationParams
from tests.checkpoints import save_llama, tiny_llama
from tests.command import tandem

PROMPTS = [tuple((7 * start + 3 * i * i) % 251 for i in range(20)) for start in range(4)]
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
ROW = Row(
    pair="111m",
    draft="model",
    draft_precision="auto",
    target_precision="none",
    sampling="greedy",
    batch=1,
    k="3",
    tau=TAU[0],
    tokens_per_s=Spread(200.0, 190.0, 210.0),
    plain_tokens_per_s=Spread(100.0, 99.0, 101.0),
    speedup=Spread(2.0, 1.9, 2.1),
    draft_cost=0.1,
    verify_cost=1.2,
    predicted_speedup=2.1,
    acceptance_rate=0.6,
    alpha=0.8,
    mean_accepted_length=1.8,
    rollbacks=40,
    tau_stops=0,
    draft_share=0.3,
    verify_share=0.6,
    loop_share=0.1,
    identical=True,
)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A checkpoint of the tiny target's vocabulary that knows nothing of it."""
    return save_llama(tmp_path_factory.mktemp("pair") / "stranger", seed=5)


def rig_of(draft, setup: Setup = STORED_DRAFT) -> Rig:
    return Rig(Pair(tiny_llama(), draft), setup, max_sequences=4, max_tokens=40, threads=1)


def asking(k: int) -> SpeculationParams:
    return SpeculationParams(num_assistant_tokens=k)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_run_counts_what_happened(stranger, batch) -> None:
    rig = rig_of(stranger)
    rig.prefill(PROMPTS)
    plain = rig.run(rig.plain, PROMPTS, batch, GREEDY)
    assert [len(output) for output in plain.outputs] == [12] * 4
    assert (plain.num_steps, plain.num_drafted, plain.draft_s) == (48, 0, 0.0)
    run = rig.run(rig.constant, PROMPTS, batch, GREEDY, asking(3))
    assert run.outputs == plain.outputs
    assert run.num_tokens == 48
    assert run.num_drafted > run.num_accepted
    assert 0 < run.num_rollbacks <= run.num_steps
    assert 0 < run.draft_s + run.verify_s < run.seconds


def test_a_perfect_draft_is_accepted_whole() -> None:
    rig = rig_of(tiny_llama())
    rig.prefill(PROMPTS)
    run = rig.run(rig.constant, PROMPTS, 1, GREEDY, asking(3))
    assert (run.alpha, run.acceptance_rate, run.num_rollbacks) == (1.0, 1.0, 0)
    assert run.num_steps == 4 * 4  # one while the draft reads the prompt, then 4, 4 and 3 tokens
    assert run.mean_accepted_length == 2


def test_prompts_can_be_decoded_again_and_measuring_costs_leaves_them_alone(stranger) -> None:
    rig = rig_of(stranger)
    rig.prefill(PROMPTS)
    first = rig.run(rig.plain, PROMPTS, 4, GREEDY).outputs
    decoder = rig.auto()
    rig.run(decoder, PROMPTS, 2, replace(GREEDY, temperature=0.9))
    assert rig.run(decoder, PROMPTS, 4, GREEDY).outputs == first
    assert rig.outputs(PROMPTS, 3, GREEDY) == first


def test_where_one_sequence_ends_the_next_joins(stranger, monkeypatch) -> None:
    rig, sizes = rig_of(stranger), []
    rig.prefill(PROMPTS)
    stop = rig.run(rig.plain, PROMPTS, 4, GREEDY).outputs[0][2]
    step = rig.plain.step
    monkeypatch.setattr(rig.plain, "step", lambda running: sizes.append(len(running)) or step(running))
    rig.run(rig.plain, PROMPTS, 2, replace(GREEDY, stop_token_ids=(stop,)))
    assert sizes[:4] == [2] * 4  # one was over after three
    assert sizes == sorted(sizes, reverse=True)


def test_unsure_drafts_stop_early_and_are_counted(stranger) -> None:
    rig = rig_of(stranger)
    rig.prefill(PROMPTS)
    asked = SpeculationParams(num_assistant_tokens=5, assistant_confidence_threshold=1.0)
    run = rig.run(rig.constant, PROMPTS, 4, GREEDY, asked)
    assert run.num_drafted == 0
    assert run.num_tau_stops > 0


@pytest.mark.parametrize("sampling", ["greedy", "sampled"])
def test_a_group_is_measured_against_plain_decoding(stranger, sampling) -> None:
    group = Group("tiny", MODEL, 2, sampling, (Cell(1), Cell(3, 0.2), Cell(AUTO)))
    runs: list[int] = []
    rows = sweep.measure(rig_of(stranger), group, PROMPTS, 12, 2, lambda: runs.append(1))
    assert len(runs) == sweep.num_runs(group, 2)
    assert [(row.k, row.tau, row.batch) for row in rows] == [
        ("1", TAU[0], 2),
        ("3", 0.2, 2),
        ("auto", TAU[0], 2),
    ]
    for row in rows:
        assert row.identical is (True if sampling == "greedy" else None)
        assert row.speedup.low <= row.speedup.median <= row.speedup.high
        assert row.draft_share + row.verify_share + row.loop_share == pytest.approx(1)
        assert (row.predicted_speedup is None) == (row.k == "auto" or row.tau > TAU[0])


@pytest.mark.parametrize(
    "setup", [NGRAM, Setup(draft="self", draft_precision="int8"), Setup(draft_precision="int8")], ids=str
)
def test_every_draft_can_be_measured(stranger, setup) -> None:
    (row,) = sweep.measure(
        rig_of(stranger, setup), Group("tiny", setup, 1, "greedy", (Cell(3),)), PROMPTS, 12, 1, int
    )
    assert row.identical
    assert (row.draft, row.draft_precision) == (setup.draft, setup.draft_precision)


@given(st.floats(0, 1), st.integers(1, 15))
def test_the_formula_counts_tokens_as_drawing_them_would(alpha, k) -> None:
    """E[tokens] = Σ P(at least i draft tokens stand), and one more."""
    assert formula.tokens_per_step(alpha, k) == pytest.approx(sum(alpha**i for i in range(k + 1)), rel=1e-6)


def test_a_free_perfect_draft_saves_all_but_one_step_in_k_plus_one() -> None:
    assert formula.predict(1.0, 4, StepCosts(0.0, 2.0, 2.0)).speed_up == 5
    assert formula.predict(0.0, 4, StepCosts(0.1, 2.0, 2.4)).speed_up == pytest.approx(2.0 / 2.8)


def test_everything_is_the_whole_product() -> None:
    groups = everything(("large", "raw"))
    found = {(g.pair, g.setup, g.batch, g.sampling, cell.k, cell.tau) for g in groups for cell in g.cells}
    setups = len({group.setup for group in groups})
    assert len(found) == 2 * setups * len(BATCHES) * 2 * (len(K) + 1) * len(TAU)
    assert {g.setup.draft for g in groups} == {"model", "ngram", "self", "qspec"}


def test_the_default_run_covers_every_dimension() -> None:
    groups = designed("large", "small draft", "raw")
    cells = [(group, cell) for group in groups for cell in group.cells]
    assert {cell.k for _, cell in cells} == {*K, AUTO}
    assert {cell.tau for _, cell in cells} == set(TAU)
    assert {group.batch for group in groups if group.pair == "large"} == set(BATCHES)
    assert {group.sampling for group in groups} == {"greedy", "sampled"}
    assert all(group.num_prompts % group.batch == 0 for group in groups)
    assert all(s.target_precision in FOUR_BITS for s in (g.setup for g in groups) if s.draft == "qspec")


def test_prompts_are_held_out_different_and_the_same_every_time() -> None:
    data = held_out(BUNDLED.target)
    assert prompts(data, 48, 128) == prompts(held_out(BUNDLED.target), 48, 128)
    assert len(set(prompts(data, 48, 128))) == 48
    assert is_held_out("selectors.py")
    assert {len(window) for window in windows(data, 24, 256)} == {256}
    with pytest.raises(ConfigError, match=r"has .* prompts"):
        prompts(data, 100_000, 128)


def test_loops_are_told_apart() -> None:
    steady = tuple(range(120))
    loop = tuple(range(20)) + (1, 2, 3) * 34
    assert by_looping([steady, loop[:120]], 10) == ([steady], [loop[:120]])


def test_a_model_agrees_with_itself_and_not_with_a_stranger(stranger) -> None:
    target, other = (ModelRunner.load(p, num_blocks=4, block_size=16) for p in (tiny_llama(), stranger))
    corpus = Corpus("text", [prompt * 2 for prompt in PROMPTS], first=5, temperature=0.5)
    itself, unknown = agreements(target, {"itself": target, "other": other}, corpus)
    assert (itself.greedy, itself.overlap, itself.same_draw) == (1.0, pytest.approx(1.0), 1.0)
    assert itself.accepted_of_3 == pytest.approx(3.0)
    assert itself.positions == 4 * 35
    assert unknown.greedy < 0.5
    assert unknown.overlap < 0.9
    assert unknown.same_draw < unknown.overlap + 0.15


def test_modesty_is_the_power_that_makes_confidence_right() -> None:
    confidence = torch.tensor([0.2, 0.5, 0.9])
    for power in (0.4, 1.0, 2.0):
        assert modesty(confidence, (confidence**power).mean().item()) == pytest.approx(power, abs=1e-4)


@pytest.mark.long
def test_quality_falls_with_precision() -> None:
    data = held_out(BUNDLED.target)
    skipped: list[str] = []
    rows = measure_quality(BUNDLED.target, windows(data, 2, 256), lambda what, why: skipped.append(what))
    found = {row.precision: row for row in rows}
    assert found["fp32"].greedy_agreement == found["fp16"].greedy_agreement == 1
    assert found["fp16"].perplexity == pytest.approx(found["fp32"].perplexity, rel=1e-4)
    for name in {"int8", "nf4"} & found.keys():
        assert 0 < found[name].divergence < 0.5
        assert 0.8 < found[name].greedy_agreement < 1
    if {"int8", "nf4"} <= found.keys():
        assert found["int8"].divergence < found["nf4"].divergence


def results_of(*rows: Row) -> Results:
    return Results({"111m": BUNDLED, "raw": BUNDLED}, rows=list(rows))


def test_goals_take_the_best_k_and_the_worst_batch() -> None:
    fast = replace(ROW, k="5", speedup=Spread(2.2, 2.0, 2.3))
    batch = replace(ROW, k="auto", batch=16, speedup=Spread(0.95, 0.9, 1.0))
    other = replace(ROW, target_precision="nf4", speedup=Spread(9.0, 9.0, 9.0))  # has other tokens
    small = replace(ROW, draft_precision="int8", speedup=Spread(2.3, 2.2, 2.4))
    found = {goal.what: goal for goal in goals(results_of(ROW, fast, batch, other, small), "111m", "none")}
    assert found["111m, batch 1, best k"].measured == 2.3
    assert found["111m, batch 1, best k"].where.endswith("int8 draft")
    assert found["111m, batch 1, best k"].holds
    assert not found["111m, k auto, worst batch"].holds
    assert not any(what.startswith("raw") for what in found)


def test_goals_are_those_of_the_target_that_was_asked_for() -> None:
    bf16 = replace(ROW, target_precision="bf16", speedup=Spread(2.5, 2.4, 2.6))
    for quantization, measured in (("none", ROW.speedup.median), ("bf16", 2.5)):
        (goal,) = goals(results_of(ROW, bf16), "111m", quantization)
        assert goal.measured == measured


def test_goals_tell_the_grown_draft_from_the_small_one() -> None:
    row = replace(ROW, pair=small_draft("111m"), batch=4, speedup=Spread(1.5, 1.4, 1.6))
    assert [goal.what for goal in goals(results_of(row), "111m", "none")] == [
        "111m, raw draft, batch 4, best k"
    ]


def test_results_are_shown_and_written(tmp_path) -> None:
    results, options = (
        results_of(
            ROW,
            replace(
                ROW, k="auto", draft_cost=None, verify_cost=None, predicted_speedup=None, identical=False
            ),
        ),
        Options(),
    )
    content = report.document(results, options)
    report.save(tmp_path / "new" / "folder", content)
    stored = json.loads((tmp_path / "new" / "folder" / "speculation.json").read_text())
    wanted = "batch k tau sampling draft draft_precision target_precision tokens_per_s plain_tokens_per_s"
    assert {*wanted.split(), "speedup", "acceptance_rate", "rollbacks", "identical"} <= stored["rows"][
        0
    ].keys()
    with (tmp_path / "new" / "folder" / "rows.csv").open() as file:
        assert [row["k"] for row in csv.DictReader(file)] == ["3", "auto"]
    out = io.StringIO()
    report.show(results, options, Console(file=out, width=140))
    assert "2.00x" in out.getvalue()
    assert "NO" in out.getvalue()


def test_plots_are_drawn(tmp_path) -> None:
    rows = [
        replace(ROW, k=k, batch=batch, tau=tau, sampling=sampling)
        for k in ("1", "3", "auto")
        for batch in (1, 4)
        for tau in TAU
        for sampling in ("greedy", "sampled")
    ]
    files = list(plots.draw(tmp_path, rows))
    assert [file.name for file in files] == [
        *("acceptance-111m.png", "speedup-by-k-111m.png", "speedup-by-tau-111m.png"),
    ]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_without_matplotlib_it_is_said_what_to_do(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tandem-serve\[bench\].*--no-plots"):
        require_matplotlib()


def test_a_size_that_does_not_exist_is_refused() -> None:
    done = tandem("bench", "speculation", "--large", "2b")
    assert done.returncode == 2
    assert "111m, 1b, 8b, not 2b" in done.stderr


@pytest.mark.long
def test_the_whole_benchmark_in_small(monkeypatch) -> None:
    """Every part of it on the raw pair, with one group that can be measured and one that cannot."""
    monkeypatch.setattr(runner, "inflated_pair", lambda to: BUNDLED)
    monkeypatch.setattr(runner, "CANDIDATES", 24)
    monkeypatch.setattr(agreement, "TEXT_WINDOWS", 1)
    monkeypatch.setattr(agreement, "PROMPTS", 8)
    monkeypatch.setattr(runner, "OUTPUT_TOKENS", 96)
    groups = [Group("raw", setup, 1, "greedy", (Cell(3),), 1) for setup in (MODEL, Setup(draft="qspec"))]
    monkeypatch.setattr(runner, "designed", lambda *pairs: groups)
    results = Benchmark(Options(rounds=1, threads=1)).run()
    assert [row.identical for row in results.rows] == [True]
    assert results.skipped[-1].what == "raw: draft qspec, greedy, batch 1"
    assert "four-bit" in results.skipped[-1].why
    assert {row.pair for row in results.peers} == {"raw", "111m", small_draft("111m")}
    assert {"Tandem, plain", "transformers, assisted"} <= {row.system for row in results.peers}
    assert "held-out text" in {row.along for row in results.agreement}
    assert results.quality[0].precision == "fp32"


@pytest.fixture
def called(monkeypatch) -> list[str]:
    """Parts of the benchmark that were begun, none of which does anything."""
    begun: list[str] = []
    monkeypatch.setattr(runner, "inflated_pair", lambda to: BUNDLED)
    monkeypatch.setattr(Benchmark, "_measure_models", lambda self, meter: begun.append("models"))
    monkeypatch.setattr(Benchmark, "_steady_prompts", lambda self, count: [])
    monkeypatch.setattr(
        Benchmark, "_measure_peers", lambda self, pair, *rest: begun.append(f"{pair}: others")
    )
    monkeypatch.setattr(Benchmark, "_measure_group", lambda self, group, *rest: begun.append(group.label))
    return begun


def test_all_of_it_is_measured_without_being_named(called) -> None:
    Benchmark(Options(threads=1)).run()
    pairs = "111m", "111m, raw draft", "raw"
    others = sorted(f"{pair}: others" for pair in pairs)
    assert called[0] == "models"
    assert sorted(called[1:4]) == others
    assert called[4:] == [group.label for group in designed(*pairs)]


def test_only_what_is_named_is_measured(called) -> None:
    Benchmark(Options(threads=1, only=("raw draft: draft model, greedy, batch 4", "raw: others"))).run()
    assert called == ["raw: others", "111m, raw draft: draft model, greedy, batch 4"]


def test_a_target_in_another_precision_is_that_of_every_group_without_its_own(called) -> None:
    only = ("111m: draft model target bf16, greedy, batch 4", "111m: draft qspec")
    Benchmark(Options(threads=1, only=only, quantization="bf16")).run()
    assert called == [
        "111m: draft model target bf16, greedy, batch 4",
        "111m: draft qspec target nf4, greedy, batch 1",
        "111m: draft qspec target int4, greedy, batch 1",
    ]


def test_a_name_that_nothing_has_is_refused_with_those_there_are(called) -> None:
    with pytest.raises(ConfigError, match=r"nothing has 'eagle' in its name.*draft ngram, greedy, batch 1"):
        Benchmark(Options(threads=1, only=("eagle",))).run()
    assert called == []


def test_nothing_is_begun_when_the_time_is_over(called) -> None:
    results = Benchmark(Options(minutes=0, threads=1)).run()
    assert results.rows == []
    assert [skipped.why for skipped in results.skipped] == ["no time left"] * len(designed("", "", ""))


def test_a_profile_tells_the_draft_from_the_target(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(runner, "inflated_pair", lambda to: BUNDLED)
    monkeypatch.setattr(runner, "OUTPUT_TOKENS", 24)
    asked = [tuple(range(5, 100))]
    for part, found in (("_measure_models", None), ("_measure_peers", None), ("_steady_prompts", asked)):
        monkeypatch.setattr(Benchmark, part, lambda self, *rest, found=found: found)
    Benchmark(Options(minutes=0, threads=1, profile=tmp_path)).run()
    text = (tmp_path / "speculation-111m.txt").read_text()
    rows = [line.split()[0] for line in text.splitlines() if line[:1].isalpha()]
    assert {"draft", "verify", "accept", "Python"} <= set(rows)
    assert (tmp_path / "speculation-111m.trace.json").exists()
