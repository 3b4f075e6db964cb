"""The C++ kernels:  same bits from every instruction set and team, and a clear word where they cannot run."""

import math
import os
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem.engine.batch import SequenceRows
from tandem.engine.costs import measure_costs
from tandem.engine.draw import Draw
from tandem.engine.model_runner import ModelRunner
from tandem.engine.native import build, library, packing
from tandem.engine.native.build import NotNativeError
from tandem.engine.native.decoder import ANGLE_PAGE, _Angles
from tandem.engine.paged_cache import PagedCache
from tandem.engine.rng import Stream
from tandem.engine.sampler import NO_TOKEN, choose
from tandem.errors import ConfigError
from tests.engine.conftest import build_model

PROMPT = torch.randint(3, 160, (60,), generator=torch.Generator().manual_seed(5)).tolist()
BEST = build.instruction_set()


@pytest.fixture(scope="module")
def engines():
    """One per team: a lone thread, and three on whatever cores there are."""
    return [library.Engine(library.load(BEST), threads) for threads in (1, 3)]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 130),
    out_features=st.integers(1, 100),
    in_features=st.integers(1, 600),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_a_row_has_the_same_bits_in_every_batch(engines, rows, out_features, in_features, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    packed = packing.pack_linear(weight, torch.randn(out_features))
    x = torch.randn(rows, in_features, generator=generator)
    alone, team = engines
    together = alone.linear(packed, x)
    assert torch.equal(team.linear(packed, x), together)
    row = seed % rows
    assert torch.equal(alone.linear(packed, x[row : row + 1].contiguous())[0], together[row])


def test_a_library_shares_nothing_with_that_of_another_instruction_set():
    """A static variable of a function in a header is one for all libraries of a process, unless it is hidden:
    then they would use each other's buffers, which are aligned for other types."""
    command = ["nm", "--dynamic", "--defined-only", str(build.library(BEST))]
    symbols = [line.split()[1:] for line in subprocess.check_output(command, text=True).splitlines()]
    assert [name for kind, name in symbols if kind == "u"] == []
    assert ["T", "tandem_forward"] in symbols


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 9, 60])
def test_storage_changes_no_bit(engines, dtype, rows):
    """Weights of two bytes are converted exactly."""
    weight, x = torch.randn(33, 257).to(dtype), torch.randn(rows, 257)
    half, single = (packing.pack_linear(stored) for stored in (weight, weight.float()))
    assert torch.equal(engines[0].linear(half, x), engines[0].linear(single, x))
    assert half.num_bytes * 2 == single.num_bytes


@pytest.mark.parametrize("name", ["llama3", "llama-linear"])
def test_a_checkpoint_in_bfloat16_keeps_its_two_bytes_and_its_bits(tmp_path, monkeypatch, other_isa, name):
    """Small numbers of it are none in half precision, and every checkpoint has such."""
    model = build_model(name).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[0] = 1e-7
    model.save_pretrained(tmp_path)
    rows, found = [SequenceRows(PROMPT, 0, range(4), len(PROMPT))], []
    for isa, linear in ((BEST, "auto"), (BEST, "fp32"), (other_isa, "auto")):
        monkeypatch.setenv("TANDEM_NATIVE", isa)
        runner = ModelRunner.load(tmp_path, num_blocks=4, block_size=16, linear=linear)
        kernels = {choice.kernel for choice in runner.linear_report().values()}
        assert kernels == {"native-fp32" if linear == "fp32" else "native-bf16-weights"}
        found.append(runner.forward(runner.batch(rows)))
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])


def test_angles_are_what_they_are_and_not_torchs():
    """torch's cosines on several busy cores are not the same in every process."""
    inv_freq = 10000.0 ** -(torch.arange(0, 64, 2) / 64)
    angles = _Angles(torch.empty(0, 2, 32)).up_to(600, inv_freq).up_to(1100, inv_freq)
    assert angles.num_positions == 3 * ANGLE_PAGE
    exact = [[position * f for f in inv_freq.tolist()] for position in range(3 * ANGLE_PAGE)]
    for which, function in enumerate((math.cos, math.sin)):
        wanted = torch.tensor([[function(angle) for angle in row] for row in exact])
        assert torch.equal(angles._values[:, which], wanted)


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["llama3", "llama-linear", "mistral", "qwen3", "olmo", "olmo2"])
def test_every_instruction_set_gives_the_same_bits(saved_model, monkeypatch, other_isa, name, kv_dtype):
    path = saved_model(name, True)[1]
    logits = []
    for isa in (other_isa, BEST):
        monkeypatch.setenv("TANDEM_NATIVE", isa)
        runner = ModelRunner.load(
            path, num_blocks=8, block_size=16, implementation="native", kv_dtype=kv_dtype
        )
        assert runner.implementation_reason == f"kernels for {isa}"
        prompt = 2 * PROMPT
        first = runner.forward(runner.batch([SequenceRows(prompt[:50], 0, range(4), 50)]))
        second = runner.forward(runner.batch([SequenceRows(prompt[50:], 50, range(8), 70)]))
        logits.append(torch.cat([first, second]))
    assert other_isa != BEST
    assert torch.equal(*logits)


@pytest.mark.slow
def test_every_instruction_set_draws_the_same_tokens(other_isa):
    logits = 3 * torch.randn(500, 1003, generator=torch.Generator().manual_seed(1))
    draws = [Draw(i, 3 * i, Stream.TOKEN, 0.9, 0.95, 0.001, 300) for i in range(len(logits))]
    packed = library.pack_draws(draws)
    other, best = (library.choose(isa, logits, packed, masked=False) for isa in (other_isa, BEST))
    assert other == best


@pytest.mark.slow
def test_every_instruction_set_rounds_to_halves_as_torch_does(tmp_path, monkeypatch, other_isa):
    """Values that are nothing but their bias: ties, numbers below the normal ones, too large ones, none."""
    model = build_model("llama-linear")
    few = [1.0, -0.1, 65519.0, 65520.0, -1e6, 6.1e-5, 6.0e-5, 5e-8, -2.9e-8, 2.98e-8, 1e-30, 2049.0, 2051.0]
    bits = torch.randint(0, 2**31, (48 - len(few) - 2,), generator=torch.Generator().manual_seed(3))
    values = torch.tensor([*few, math.inf, math.nan, *bits.int().view(torch.float32).tolist()])
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.zero_()
        model.model.layers[0].self_attn.v_proj.bias.copy_(values)
    model.save_pretrained(tmp_path)
    for isa in (other_isa, BEST):
        monkeypatch.setenv("TANDEM_NATIVE", isa)
        runner = ModelRunner.load(tmp_path, num_blocks=2, block_size=16, kv_dtype="float16")
        assert runner.implementation_reason == f"kernels for {isa}"
        runner.forward(runner.batch([SequenceRows(PROMPT[:20], 0, [0, 1])]))
        held = runner.cache.read_blocks([0])[0, 0, 1, 3].flatten()
        assert torch.equal(held.isnan(), values.isnan())
        assert torch.equal(held.nan_to_num(7.0, 8.0, 9.0), values.half().nan_to_num(7.0, 8.0, 9.0))


@pytest.mark.parametrize(("dtype", "far", "near"), [("float16", 0.02, 0.1), ("bfloat16", 0.1, 1.0)])
@pytest.mark.parametrize("name", ["llama3", "mistral"])
def test_narrow_kv_is_rounded_floats_and_attended_to_as_such(saved_model, name, dtype, far, near):
    """Layer 0 has seen no attention yet; what comes of it is what torch makes of the same numbers. In
    bfloat16 queries and weights are rounded too."""
    path, rows = saved_model(name)[1], [SequenceRows(PROMPT, 0, range(4), len(PROMPT))]
    caches, logits = [], []
    for implementation, kv_dtype in (("native", "float32"), ("native", dtype), ("lean", dtype)):
        runner = ModelRunner.load(
            path, num_blocks=4, block_size=16, implementation=implementation, kv_dtype=kv_dtype
        )
        logits.append(runner.forward(runner.batch(rows)))
        caches.append(runner.cache.read_blocks(range(4), 0, 1))
    whole, ours, torchs = logits
    assert torch.equal(caches[0].to(getattr(torch, dtype)), caches[1])
    assert 0 < (whole - ours).abs().max() < far
    assert (ours - torchs).abs().max() < near * (whole - ours).abs().max()


@pytest.mark.parametrize("kv_dtype", ["float16", "bfloat16"])
def test_one_model_runs_over_caches_of_any_dtype(saved_model, kv_dtype):
    path, rows = saved_model("llama3")[1], [SequenceRows(PROMPT, 0, range(4), len(PROMPT))]
    whole, narrow = (
        ModelRunner.load(path, num_blocks=4, block_size=16, implementation="native", kv_dtype=dtype)
        for dtype in ("float32", kv_dtype)
    )
    over = whole.over(PagedCache(narrow.geometry, 4, 16, getattr(torch, kv_dtype)))
    assert torch.equal(over.forward(over.batch(rows)), narrow.forward(narrow.batch(rows)))


@pytest.mark.parametrize("kv_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("start", [1, 61, 63, 64, 100])
def test_what_a_row_may_not_see_may_be_no_number(tmp_path, kv_dtype, start):
    """A token whose keys and values are no numbers, behind others in one forward: these have the bits they
    would have without it."""
    model = build_model("mistral")
    with torch.no_grad():
        model.model.embed_tokens.weight[9] = math.inf
    model.save_pretrained(tmp_path)
    runner = ModelRunner.load(
        tmp_path, num_blocks=10, block_size=16, implementation="native", kv_dtype=kv_dtype
    )
    prompt = [token for token in 3 * PROMPT if token != 9]
    runner.forward(runner.batch([SequenceRows(prompt[:start], 0, range(10))]))
    tokens = [*prompt[start : start + 5], 9, *prompt[start + 5 : start + 8]]
    clean = runner.forward(runner.batch([SequenceRows(tokens[:5], start, range(10), 5)]))
    found = runner.forward(runner.batch([SequenceRows(tokens, start, range(10), 9)]))
    assert torch.equal(found[:5], clean)
    assert clean.isfinite().all()
    assert found[5:].isnan().all()


def test_an_extreme_row_is_not_hidden(make_runner):
    """NaN and infinity in the cache reach the logits, where they are noticed, and no other sequence."""
    runner = make_runner("llama3", implementation="native")
    rows = [SequenceRows(PROMPT[:20], 0, [i * 2, i * 2 + 1]) for i in range(2)]
    runner.forward(runner.batch(rows))
    step = runner.batch([SequenceRows([7], 20, [i * 2, i * 2 + 1]) for i in range(2)])
    good = runner.forward(step)[1]
    for poison in (b"\xff\xff\xff\xff", b"\x00\x00\x80\x7f"):
        runner.cache.write_blocks([0], poison * (runner.cache.block_bytes // 4))
        spoiled = runner.forward(step)
        assert not spoiled[0].isfinite().all()
        assert torch.equal(spoiled[1], good)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), min_size=1, max_size=5))
def test_tokens_chosen_in_the_forward_are_those_of_its_logits(make_runner, shapes):
    """Of every row asked for, in every shape of batch, whatever runs the forward."""
    rows = [
        SequenceRows(PROMPT[i : i + count], 0, [2 * i, 2 * i + 1], min(wanted, count))
        for i, (count, wanted) in enumerate(shapes)
    ]
    for implementation in ("native", "lean"):
        runner = make_runner("llama3", implementation=implementation)
        logits = runner.forward(runner.batch(rows))
        assert runner.choose(rows) == logits.argmax(-1).tolist()
        draws = [Draw(i, i, Stream.TOKEN, i % 2, 0.9, 0.0, 20) for i in range(len(logits))]
        assert runner.choose(rows, draws) == choose(logits, draws)


@pytest.mark.parametrize("implementation", ["native", "lean"])
@pytest.mark.parametrize("poison", [b"\xff\xff\xff\xff", b"\x00\x00\x80\x7f"])
def test_a_row_without_numbers_has_no_most_probable_token(make_runner, implementation, poison):
    runner = make_runner("llama3", implementation=implementation)
    runner.forward(runner.batch([SequenceRows(PROMPT[:20], 0, [i * 2, i * 2 + 1]) for i in range(2)]))
    step = [SequenceRows([7], 20, [i * 2, i * 2 + 1]) for i in range(2)]
    good = runner.choose(step)[1]
    runner.cache.write_blocks([0], poison * (runner.cache.block_bytes // 4))
    assert runner.choose(step) == [NO_TOKEN, good]


@pytest.mark.parametrize("tokens", [[160], [-1], [3, 1 << 20]])
def test_tokens_outside_the_vocabulary_are_refused(make_runner, tokens):
    runner = make_runner("llama3", implementation="native")
    with pytest.raises(ValueError, match=r"token ids must be in \[0, 160\)"):
        runner.forward(runner.batch([SequenceRows(tokens, 0, [0])]))


@pytest.mark.parametrize(("start", "table"), [(15, [0]), (0, []), (0, [64]), (0, [-1])])
def test_rows_without_blocks_are_refused(make_runner, start, table):
    runner = make_runner("llama3", implementation="native")
    with pytest.raises(ValueError, match=r"do not fit in|block ids must be in"):
        runner.batch([SequenceRows([5, 6], start, table)])


def load(path, implementation="auto"):
    return ModelRunner.load(path, num_blocks=8, block_size=16, implementation=implementation)


@pytest.mark.usefixtures("unbuilt")
def test_without_a_compiler_torch_runs_and_says_so(saved_model, monkeypatch, tmp_path):
    path = saved_model("llama3")[1]
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    runner = load(path)
    assert runner.implementation == "lean"
    assert "no C++ compiler" in runner.implementation_reason
    with pytest.raises(
        ConfigError, match="implementation native cannot run here: there is no C\\+\\+ compiler"
    ):
        load(path, "native")


@pytest.mark.usefixtures("unbuilt")
def test_a_compiler_that_fails_is_quoted(saved_model, monkeypatch, tmp_path):
    compiler = tmp_path / "cxx"
    compiler.write_text("#!/bin/sh\necho cannot do that >&2\nexit 3\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler))
    assert "failed: cannot do that" in load(saved_model("llama3")[1]).implementation_reason


def test_off_means_torch(saved_model, monkeypatch):
    monkeypatch.setenv("TANDEM_NATIVE", "off")
    assert load(saved_model("llama3")[1]).implementation == "lean"
    monkeypatch.setenv("TANDEM_NATIVE", "sse9")
    with pytest.raises(
        ConfigError, match="TANDEM_NATIVE must be auto, off, avx512bf16, avx512, avx2, plain, not sse9"
    ):
        load(saved_model("llama3")[1])


def test_a_cache_that_others_can_write_is_not_used(monkeypatch, tmp_path):
    """What lies there is run."""
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    monkeypatch.setenv("TANDEM_CACHE", str(folder))
    with pytest.raises(NotNativeError, match="writable by nobody else"):
        build.library(BEST)
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "new"))
    assert stat.S_IMODE(build.cache_folder().stat().st_mode) == 0o700
    assert build.cache_folder().stat().st_uid == os.getuid()


def test_a_library_is_built_once(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_compile", lambda compiler, isa, file: file.write_bytes(b"built"))
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path))
    first = build.library("plain")
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("built again"))
    assert build.library("plain") == first
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DCHANGED"))
    assert first not in (first.parent / f"native-plain-{build._recipe('g++', 'plain')}.so",)


def test_threads_share_a_model(make_runner):
    """Two workers in one process, each with its own cache, at the same time."""
    shared = make_runner("qwen3", implementation="native")
    runners = [
        ModelRunner(shared._model, shared.geometry, PagedCache(shared.geometry, 8, 16), {}) for _ in range(2)
    ]

    def complete(runner, prompt):
        for _ in range(30):
            logits = runner.forward(runner.batch([SequenceRows(prompt, 0, range(4))]))
        return logits

    prompts = PROMPT, PROMPT[::-1]
    expected = [complete(*pair) for pair in zip(runners, prompts, strict=True)]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(complete, runners, prompts))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def step_by_step(runner, rows, count, threshold, least):
    """The same guess by single forwards."""
    token_ids, next_rows, product = [], rows, 1.0
    while len(token_ids) < count and product >= least:
        logits = runner.forward(runner.batch([next_rows]))[0]
        token_id = int(logits.argmax())
        confidence = logits.double().softmax(-1)[token_id].item()
        if confidence < threshold:
            return token_ids, True
        product *= confidence
        token_ids.append(token_id)
        start = rows.start + len(rows.token_ids) + len(token_ids) - 1
        next_rows = SequenceRows([token_id], start, rows.block_table)
    return token_ids, False


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lens=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    counts=st.lists(st.integers(1, 8), min_size=5, max_size=5),
    thresholds=st.lists(st.sampled_from([0.0, 0.005, 0.0075, 0.01, 1.0]), min_size=5, max_size=5),
    products=st.lists(st.sampled_from([0.0, 1e-6, 5e-5, 0.5]), min_size=5, max_size=5),
)
def test_guesses_in_one_call_are_those_of_single_forwards(make_runner, lens, counts, thresholds, products):
    """Any number of rows to catch up on, any depths and limits; the cache holds the same afterwards."""
    runner = make_runner("llama3", implementation="native")
    rows = [
        SequenceRows(PROMPT[i : i + count], 0, range(2 * i, 2 * i + 2), 1) for i, count in enumerate(lens)
    ]
    zeros = bytes(10 * runner.cache.block_bytes)
    runner.cache.write_blocks(range(10), zeros)
    limits = zip(rows, counts, thresholds, products, strict=False)
    expected = [step_by_step(runner, *each) for each in limits]
    stored = runner.cache.read_blocks(range(10))
    runner.cache.write_blocks(range(10), zeros)
    num = len(rows)
    got = runner.guess(rows, counts[:num], thresholds[:num], None, products[:num])
    assert [(guess.token_ids, guess.is_unsure) for guess in got] == expected
    assert torch.equal(runner.cache.read_blocks(range(10)), stored)


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.7}, {"top_k": 20, "min_p": 0.1}])
def test_drawn_guesses_are_those_of_single_forwards(make_runner, filters):
    """Each with the number of its position; greedy sequences go along."""
    runner = make_runner("llama3", implementation="native")
    params = {"top_p": 1.0, "min_p": 0.0, "top_k": 0} | filters
    draws = [Draw(11 * i, 5 + i, Stream.TOKEN, i % 3 / 2, **params) for i in range(5)]
    rows = [SequenceRows(PROMPT[i : i + 9], 0, [i], 1) for i in range(5)]
    expected: list[list[int]] = [[] for _ in rows]
    following = rows
    for depth in range(5):
        chosen = runner.choose(following, [d._replace(position=d.position + depth) for d in draws])
        for token_ids, token_id in zip(expected, chosen, strict=True):
            token_ids.append(token_id)
        following = [SequenceRows([t], 9 + depth, [i]) for i, t in enumerate(chosen)]
    guesses = runner.guess(rows, [5] * 5, [0.0] * 5, draws)
    assert [guess.token_ids for guess in guesses] == expected
    assert not any(guess.is_unsure for guess in guesses)
    few = runner.guess(rows, [5] * 5, [1.0] * 5, draws)
    assert all(guess.is_unsure and not guess.token_ids for guess in few[1:3])


def test_guesses_that_do_not_fit_are_refused(make_runner):
    runner = make_runner("llama3", implementation="native")
    rows = [SequenceRows([5, 6], 13, [0])]
    assert len(runner.guess(rows, [2], [0.0])[0].token_ids) == 2
    with pytest.raises(ValueError, match="do not fit in their blocks"):
        runner.guess(rows, [3], [0.0])


def test_a_model_without_numbers_guesses_tokens_of_the_vocabulary(make_runner):
    runner = make_runner("llama3", implementation="native")
    runner.forward(runner.batch([SequenceRows(PROMPT[:10], 0, [0])]))
    runner.cache.write_blocks([0], b"\xff\xff\xff\xff" * (runner.cache.block_bytes // 4))
    rows = [SequenceRows([3], 10, [0])]
    assert runner.guess(rows, [4], [0.0])[0].token_ids == [0, 0, 0, 0]
    assert runner.guess(rows, [4], [0.1])[0].is_unsure


def test_the_cost_of_a_draft_is_that_of_guessing(make_runner, monkeypatch):
    """A forward inside a guess, without Python between the forwards."""
    runner = make_runner("llama3", implementation="native")
    calls = []
    guess = runner.guess
    monkeypatch.setattr(runner, "guess", lambda *args: calls.append(args[1]) or guess(*args))
    costs = measure_costs(runner, (1, 4), depth=3)
    assert set(map(tuple, calls)) == {(3,), (3, 3, 3, 3)}
    assert 0 < costs.seconds[0] <= costs.seconds[1]
    calls.clear()
    measure_costs(runner, (1, 4))
    assert not calls
