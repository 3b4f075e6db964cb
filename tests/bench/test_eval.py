"""`tandem eval`: experiments on real but tiny checkpoints, and what they write."""

from __future__ import annotations

import csv
import json
import math
import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from bench.eval import (
    charts,
    decoding,
    forward,
    gamma,
    qspec,
    quantization,
    quantized_pairs,
    samples,
    speculation,
    split,
    suite,
)
from bench.eval.attempt import attempt
from bench.eval.catalog import MODULES, experiment
from bench.eval.decoding import PROMPT_TOKENS, Arm, Row, measure, num_runs, per_round
from bench.eval.experiment import Chart, Findings, Series, Settings
from bench.eval.models import pair_of, target_of
from bench.eval.perplexity import read
from bench.eval.report import Report
from bench.eval.texts import Source, docstrings, read_texts, sources
from bench.eval.trackers import tracker_of
from bench.forward.rig import Rig as ForwardRig
from bench.inflate import BUNDLED, Pair
from bench.measure import Meter, Sheet, Spread
from bench.speculation.formula import StepCosts
from bench.speculation.rig import Rig, Run, Setup
from deploy.eval_app import HELP, experiments
from tandem.engine.model_runner import ModelRunner
from tandem.errors import ConfigError
from tandem.sampling import SamplingParams
from tests.checkpoints import save_llama, tiny_llama

PROMPTS = [tuple((7 * start + 3 * i * i) % 251 for i in range(20)) for start in range(5)]
GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny target and a stranger as its draft."""
    return Pair(tiny_llama(), save_llama(tmp_path_factory.mktemp("pair") / "stranger", seed=5))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Lines of random letters, every other one shorter than a sample."""
    draw, path = random.Random(0), tmp_path_factory.mktemp("texts") / "letters.txt"
    lines = ["".join(draw.choices("abcdefgh ", k=length)) for length in (150, 90) * 12]
    path.write_text("\n\n".join(lines))
    return path


@pytest.fixture
def settings(pair, texts, monkeypatch):
    """Two samples of few new tokens."""
    monkeypatch.setattr(decoding, "OUTPUT_TOKENS", 72)
    return Settings(target=pair.target, draft=pair.draft, texts=(texts,), samples=2, rounds=2, threads=1)


def test_every_arm_decodes_every_sample_and_rounds_add_up(pair) -> None:
    rig = Rig(pair, Setup(), 3, 40, 1)
    arms = {"plain": Arm.of(rig, 0, 0.0), "3": Arm.of(rig, 3, 0.0)}
    calls: list[int] = []
    found = measure(arms, PROMPTS, 1, GREEDY, 2, lambda: calls.append(1))
    assert len(calls) == num_runs(2, 5, 1, 2) == 2 * (1 + 2)
    plain, drafted = found["plain"].total, found["3"].total
    assert [len(output) for output in plain.outputs] == [8] * 5
    assert drafted.outputs == plain.outputs
    assert drafted.num_drafted == sum(run.num_drafted for run in found["3"].runs) > 0
    assert 0 < found["plain"].utilization(1) < 1.5


def test_a_total_of_no_runs_is_nothing() -> None:
    assert Run.total([]) == Run()


@given(st.integers(1, 600), st.integers(1, 32), st.integers(1, 9))
def test_rounds_are_whole_batches_that_fit_memory(count, batch, rounds) -> None:
    size = per_round(count, batch, rounds)
    assert size % batch == 0
    assert batch <= size <= max(batch, 32)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=20), st.integers(1, 30), st.integers(1, 200))
def test_samples_are_clipped_and_short_texts_left_out(lengths, count, length) -> None:
    ends = np.cumsum(lengths)
    source = Source("any", np.arange(ends[-1]), ends - lengths, ends)
    long_enough = [int(end - size) for end, size in zip(ends, lengths, strict=True) if size >= length]
    if not long_enough:
        with pytest.raises(ConfigError, match="no text of any has"):
            source.samples(count, length)
        return
    found = source.samples(count, length)
    assert len(found) == min(count, len(long_enough))
    assert {len(sample) for sample in found} == {length}
    assert {sample[0] for sample in found} <= set(long_enough)
    assert len(set(found)) == len(found)


def test_the_bundled_sources_are_held_out_text_of_three_kinds() -> None:
    found = list(sources(Settings(), BUNDLED.target))
    assert [source.name for source in found] == ["modules", "tests", "docstrings"]
    for source in found:
        assert len(source.samples(8, PROMPT_TOKENS)) == 8
        assert (source.starts < source.ends).all()


def test_docstrings_of_everything_that_has_one() -> None:
    from bench.bundled_pair.corpus import SourceFile

    text = '"""a"""\nclass C:\n    """b"""\n    def f(self):\n        """c"""\ndef g(): pass\n'
    assert docstrings([SourceFile("x.py", text)]) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("empty.txt", " \n", "holds no text"),
        ("bad.jsonl", '{"text": "a"}\nnot json', "record 2 is no JSON"),
        ("none.jsonl", '{"prompt": "a"}', "record 1 has no text"),
    ],
)
def test_unusable_texts_are_refused(tmp_path, name, content, why) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=why):
        read_texts(tmp_path / name)
    with pytest.raises(ConfigError, match="No such file"):
        read_texts(tmp_path / "missing")


def test_texts_are_lines_or_records(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "a.jsonl").write_text('{"text": "one\\ntwo"}\n')
    assert read_texts(tmp_path / "a.txt") == ["one", "two"]
    assert read_texts(tmp_path / "a.jsonl") == ["one\ntwo"]


def test_half_a_pair_is_refused(pair) -> None:
    with pytest.raises(ConfigError, match="name its --target too"):
        pair_of(Settings(draft=pair.draft))
    with pytest.raises(ConfigError, match="name a --draft"):
        pair_of(Settings(target=pair.target))
    assert target_of(Settings(target=pair.target)).pair == Pair(pair.target, pair.target)


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


def written(module, settings, found, folder) -> set[str]:
    """Names of the files, whose contents agree with one another."""
    report = Report(module, settings, found, "tandem eval any")
    files = report.save(folder / "new", with_plots=True)
    document = json.loads((folder / "new" / f"{module.NAME}.json").read_text())
    assert document["settings"]["target"] == str(settings.target)
    assert len(document["published"]) == len(found.published)
    with (folder / "new" / f"{module.NAME}.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(document["rows"]) > 0
    page = (folder / "new" / f"{module.NAME}.md").read_text()
    assert all(sheet.markdown() in page for sheet in found.sheets)
    assert all(f"({file.name})" in page for file in files if file.suffix == ".png")
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files if file.suffix == ".png")
    return {file.name for file in files}


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


def test_forward_cost(settings, tmp_path, monkeypatch) -> None:
    for name, value in {"TOKENS": 16, "INPUTS": (1, 8, 4096), "OUTPUTS": (1, 4), "LONG": 64}.items():
        monkeypatch.setattr(forward, name, value)
    monkeypatch.setattr(forward, "room", lambda *asked: 512)
    found = forward.run(settings)
    rows = found.tables["rows"]
    assert [row.batch for row in rows if row.sweep == "batch"] == [1, 2, 4, 8, 16]
    assert [row.prompt_tokens for row in rows if row.sweep == "input"] == [1, 8]
    assert [row.new_tokens for row in rows if row.sweep == "output"] == [1, 4]
    cached = [(r.prompt_tokens, r.cache) for r in rows if r.sweep == "cache"]
    assert cached == [(16, True), (16, False), (64, True), (64, False)]
    assert all(0 < row.prefill_s <= row.seconds for row in rows)
    assert "input sweep, 4096 tokens in: out of memory" in found.remarks[-1]
    assert found.sheets[0].rows[1][-2:] == ("40.7", "1.05x")
    assert [line[0] for line in found.sheets[3].rows] == ["16", "64"]
    assert "forward-batch.png" in written(forward, settings, found, tmp_path)


def test_a_prompt_that_would_take_too_long_is_left_out(settings, monkeypatch) -> None:
    monkeypatch.setattr(forward, "INPUTS", (1, 8192))
    rig = ForwardRig(settings.target, "cpu", 16 * 64)
    cost = forward.Cost("tiny", rig, replace(settings, deadline_s=time.monotonic() + 60))
    with Meter("any", 9) as meter:
        rows, remarks = cost.sweep("input", meter)
    assert [row.prompt_tokens for row in rows] == [1]
    assert "input sweep, 8192 tokens in: it may take" in remarks[0]


def cell(mix: str, rate: float, mode: str, good: float | None) -> split.Cell:
    return split.Cell(mix, rate, mode, 9, 1.0, None, 2.0, None, 50.0, 1.0, good, 1.0)


def test_split_against_unsplit(settings, tmp_path, monkeypatch) -> None:
    few, many = split.MIXES
    cells = [
        cell(m, r, mode, 0.5 + (mode == "split") * (r - 2) / 10)
        for m in (few, many)
        for r in (1.0, 2.0, 3.0)
        for mode in split.MODES
    ]
    asked = []
    monkeypatch.setattr(split, "measure", lambda *given: asked.append(given) or cells)
    chosen = replace(settings, deadline_s=time.monotonic() + 60)
    found = split.run(chosen)
    [(seconds, _, models, deadline_s)] = asked
    assert seconds == pytest.approx(0.6 * 60 / 18, rel=0.01)
    assert deadline_s == chosen.deadline_s
    assert models["speculation"] == {"draft": "model", "draft_path": str(settings.draft)}
    assert models["model"] == {"path": str(settings.target)}
    assert found.remarks[1].startswith(
        f"Good requests: split against unsplit loses with {few} at 1/s (40% against 50%), {many} at 1/s"
    )
    assert f"wins with {few} at 3/s (60% against 50%)" in found.remarks[1]
    assert "auto against unsplit draws with" in found.remarks[2]
    assert {"split-few-long.png", "split-many-long.png"} <= written(split, settings, found, tmp_path)


def test_perplexity_is_that_of_windows_scored_by_transformers() -> None:
    """The recipe of its documentation: labels of tokens that were scored before are left out."""
    tokens = torch.tensor([(5 * i * i + i) % 250 for i in range(1100)])
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama(), dtype=torch.float32).eval()
    nats, scored = 0.0, 1
    for begin in range(0, 1100, 256):
        end = min(begin + 512, 1100)
        with torch.inference_mode():
            logits = reference(tokens[None, begin:end]).logits[0]
        new = range(scored, end)
        nats += torch.nn.functional.cross_entropy(
            logits[scored - 1 - begin : end - 1 - begin], tokens[new.start : new.stop], reduction="sum"
        ).item()
        scored = end
        if end == 1100:
            break
    model = ModelRunner.load(tiny_llama(), num_blocks=32, block_size=16)
    found = read(model, tokens.tolist())
    assert found.perplexity == pytest.approx(math.exp(nats / 1099), rel=1e-4)
    assert len(found.choices) == 1099
    assert found.agreement(found) == 1


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


def test_samples_that_loop_are_left_out(settings, monkeypatch) -> None:
    subject = pair_of(settings)
    source = next(sources(settings, subject.pair.target))
    monkeypatch.setattr(samples, "by_looping", lambda texts, prompt: (texts[::2], texts[1::2]))
    found = samples.first_samples(settings, subject, source)
    assert len(found.prompts) == 2
    assert found.looping_share == 0.5
    monkeypatch.setattr(samples, "by_looping", lambda texts, prompt: ([], texts))
    with pytest.raises(ConfigError, match="all 6 continuations of letters end in a loop"):
        samples.first_samples(settings, subject, source)


def test_nothing_is_begun_when_the_time_is_over(settings) -> None:
    found = speculation.run(replace(settings, deadline_s=0.0))
    assert found.tables["rows"] == []
    assert found.remarks[-1] == "Not measured, as there was no time left: greedy, sampled."


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
