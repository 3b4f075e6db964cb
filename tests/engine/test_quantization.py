"""Quantized weights: the numbers of bitsandbytes, and kernels that compute with them row by row."""

import copy
import itertools
import json
import time
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tandem.config import ClusterConfig, ModelConfig, SpeculationConfig
from tandem.engine.batch import SequenceRows
from tandem.engine.loading import load_engine
from tandem.engine.model_runner import ModelRunner
from tandem.engine.native import build, library, packing, probe
from tandem.engine.native.arena import Arena
from tandem.engine.quantization.formats import (
    dynamic_map,
    hadamard,
    quantize,
    requantized,
)
from tandem.engine.quantization.modules import round_weights, swap_for_bitsandbytes
from tandem.errors import ConfigError
from tandem.fingerprint import model_fingerprint
from tandem.quantizations import CODED

INTEGERS = tuple(kind for kind in CODED if kind.startswith("int4"))
BEST = build.instruction_set()
# Worst error against the dequantized weights in float64, over the largest output: of sixteen bits, levels of
# a codebook have 12 and activations at least 13; those of eight lose up to 1 / 254 of their group's largest.
MAX_ERROR = {32: 1e-6, 16: 3e-4, 8: 2e-2, 4: 0.25}


def weight(out_features=48, in_features=256, seed=0):
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True], ids=["single", "double"])
def test_four_bits_are_those_of_bitsandbytes(kind, nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    w = weight(64, 320)
    packed, state = functional.quantize_4bit(w, blocksize=64, quant_type=kind, compress_statistics=nested)
    ours = quantize(w, f"{kind}-dq" if nested else kind)
    codes = ours.codes.flatten()
    assert torch.equal(codes[0::2] << 4 | codes[1::2], packed.flatten())
    theirs = functional.dequantize_4bit(packed, state)
    if nested:  # a scale in the middle between two of its 256 levels may go either way
        assert ((ours.dequantize() - theirs).abs() > 1e-6).float().mean() < 0.02
        assert torch.allclose(ours.dequantize(), theirs, rtol=5e-3)
    else:
        assert torch.equal(ours.dequantize(), theirs)


def test_eight_bits_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    w = weight().half()
    codes, scales, _ = functional.int8_vectorwise_quant(w)
    ours = quantize(w.float(), "int8")
    assert torch.equal(ours.scales[:, 0], scales / 127)
    assert (ours.codes.int() - codes.int()).abs().max() <= 1  # it rounds in half precision
    assert (ours.codes != codes).float().mean() < 1e-3


def test_the_dynamic_map_is_that_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(dynamic_map(), functional.create_dynamic_map())


@given(st.integers(1, 700), st.floats(1e-3, 1e3))
@settings(max_examples=20, deadline=None)
def test_scales_survive_double_quantization(count, size):
    scales = torch.rand(count) * size + 0.1
    assert (requantized(scales) - scales).abs().max() <= 0.03 * size


@pytest.mark.parametrize("kind", CODED)
def test_an_idle_row_stays_zero(kind):
    w = weight()
    w[3] = 0
    assert not quantize(w, kind.removesuffix("-dq")).dequantize()[3].any()


@given(st.sampled_from([1, 2, 32, 64, 128]), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_a_rotation_is_orthonormal_and_its_own_inverse(size, seed):
    values = weight(5, size, seed)
    turned = hadamard(values)
    assert torch.allclose(hadamard(turned), values, atol=1e-5)
    assert torch.allclose(turned.norm(dim=1), values.norm(dim=1), rtol=1e-5)
    assert torch.allclose(hadamard(torch.eye(size)[:1]), torch.full((1, size), size**-0.5))


def error(w, kind):
    return float((quantize(w, kind).dequantize() - w).norm() / w.norm())


def test_rotation_and_outliers_help_where_some_inputs_stick_out():
    w = weight(64, 256)
    w[:, [7, 80, 201]] *= 20
    plain, rotated = error(w, "int4"), error(w, "int4-rotated")
    apart = error(w, "int4-outliers")
    assert rotated < 0.8 * plain
    assert apart < 0.3 * plain
    assert quantize(w, "int4-outliers").outliers.inputs.tolist()[0] >= 0
    assert {7, 80, 201} <= set(quantize(w, "int4-rotated-outliers").outliers.inputs.tolist())


def test_an_outlier_of_the_activations_spoils_four_bits_less_when_turned():
    """One large input takes its group's fifteen values for itself, unless it is spread over the group."""
    w, x = weight(64, 256), torch.randn(4, 256, generator=torch.Generator().manual_seed(3))
    x[:, 9] = 60
    engine = library.Engine(library.load(BEST), 1)
    errors = {}
    for kind in ("int4", "int4-rotated"):
        quantized = quantize(w, kind)
        got = engine.linear(packing.pack_quantized(quantized, 4, None, Arena()), x)
        errors[kind] = float((got - x @ quantized.dequantize().T).norm())
    assert errors["int4-rotated"] < 0.8 * errors["int4"]


@pytest.mark.parametrize(("in_features", "group"), [(256, 64), (96, 32), (352, 32), (100, None)])
def test_groups_divide_the_inputs_or_the_layer_stays_whole(in_features, group):
    quantized = quantize(weight(16, in_features), "nf4")
    assert (quantized.group if quantized else None) == group


@pytest.mark.parametrize(
    ("kind", "bits"),
    [("int8", 32), *itertools.product(["int8", "nf4", "fp4", *INTEGERS], [16, 8, 4])],
)
@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 60),
    out_features=st.integers(1, 90),
    blocks=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_kernels_compute_with_the_dequantized_weights_row_by_row(
    kind, bits, rows, out_features, blocks, seed
):
    in_features = 32 * blocks if kind != "int8" else 32 * blocks - seed % 7
    quantized = quantize(weight(out_features, in_features, seed), kind)
    packed = packing.pack_quantized(quantized, bits, None, Arena())
    alone, team = (library.Engine(library.load(BEST), threads) for threads in (1, 3))
    x = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(seed))
    got = alone.linear(packed, x)
    exact = x.double() @ quantized.dequantize().double().T
    assert (got - exact).abs().max() <= MAX_ERROR[bits] * exact.abs().max() + 1e-6
    assert torch.equal(team.linear(packed, x), got)
    row = seed % rows
    assert torch.equal(alone.linear(packed, x[row : row + 1].contiguous())[0], got[row])
    assert alone.linear(packed, x[:0]).shape == (0, got.shape[1])  # as of a forward without logits


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_members_of_a_team_prepare_rows_for_each_other(saved_model, quantization):
    """The last of 97 rows is one that each member prepares for itself."""
    path = saved_model("llama3", True)[1]
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            runner = ModelRunner.load(
                path, num_blocks=8, block_size=16, implementation="native", quantization=quantization
            )
            found.append(runner.forward(runner.batch([SequenceRows(range(3, 100), 0, range(7), 97)])))
    finally:
        torch.set_num_threads(1)
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", ["int8", "nf4", "fp4", *INTEGERS])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_the_largest_sums_fit(kind, bits):
    """All weights and activations as large as their formats have them."""
    weights = torch.ones(16, 512)
    packed = packing.pack_quantized(quantize(weights, kind), bits, None, Arena())
    got = library.Engine(library.load(BEST), 1).linear(packed, -torch.ones(1, 512))
    assert torch.allclose(got, torch.full_like(got, -512), rtol=1e-3)


@pytest.mark.parametrize("kind", ["int8", "nf4", "int4-rotated-outliers"])
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_stays_none_in_its_row(kind, bits, bad):
    packed = packing.pack_quantized(quantize(weight(), kind), bits, None, Arena())
    engine = library.Engine(library.load(BEST), 1)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    wanted = engine.linear(packed, x)
    x[1, 37] = bad
    got = engine.linear(packed, x)
    assert not got[1].isfinite().any()
    assert torch.equal(got[[0, 2]], wanted[[0, 2]])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "bits"), [("int8", 32), *itertools.product(["int8", "nf4", *INTEGERS], [16, 8, 4])]
)
def test_every_instruction_set_gives_the_same_bits(other_isa, kind, bits):
    packed = packing.pack_quantized(quantize(weight(90, 384), kind), bits, torch.randn(90), Arena())
    x = torch.randn(9, 384)
    other, best = (library.Engine(library.load(isa), 1).linear(packed, x) for isa in (other_isa, BEST))
    assert torch.equal(other, best)


@pytest.mark.parametrize("kind", CODED)
def test_a_quantized_model_is_the_model_with_dequantized_weights(saved_model, kind):
    path = saved_model("llama3", True)[1]
    rows = SequenceRows(list(range(3, 40)), 0, range(3), 37)
    logits = []
    for implementation in ("native", "lean"):
        runner = ModelRunner.load(
            path, num_blocks=8, block_size=16, implementation=implementation, quantization=kind
        )
        logits.append(runner.forward(runner.batch([rows])))
    assert (logits[0] - logits[1]).abs().max() <= 3e-3 * logits[1].abs().max()
    whole = ModelRunner.load(path, num_blocks=8, block_size=16)
    assert not torch.allclose(whole.forward(whole.batch([rows])), logits[0], atol=1e-3)


def test_the_report_names_format_and_width(saved_model):
    path = saved_model("llama3")[1]
    runner = ModelRunner.load(path, num_blocks=2, block_size=16, quantization="nf4", activation_bits=8)
    report = runner.linear_report()
    assert report["model.layers.0.mlp.down_proj"].kernel == "native-nf4-a8"
    assert report["lm_head"].kernel == "native-fp32"


@pytest.mark.parametrize("weights", ["int8", "nf4"])
def test_a_quantization_may_name_the_width_of_activations(saved_model, weights):
    path = saved_model("llama3")[1]

    def load(quantization, **more):
        model = ModelConfig(path=path, quantization=quantization, **more)
        config = ClusterConfig(model=model, speculation=SpeculationConfig(draft="none"))
        return load_engine(config, "test", 1 << 22, 1).model, model_fingerprint(config)

    rows = [SequenceRows(list(range(3, 20)), 0, range(2), 17)]
    (wide, wide_name), (narrow, narrow_name) = load(weights), load(f"{weights}-a8")
    kernels = [m.linear_report()["model.layers.0.mlp.down_proj"].kernel for m in (wide, narrow)]
    assert kernels == [f"native-{weights}-a16", f"native-{weights}-a8"]
    assert wide_name != narrow_name  # workers of the two must not share KV
    logits = [model.forward(model.batch(rows)) for model in (wide, narrow)]
    assert 0 < (logits[0] - logits[1]).abs().max() < 0.1 * logits[0].abs().max()
    with pytest.raises(ConfigError, match=f"{weights}-a8 needs our own kernels.*: take {weights}$"):
        load(f"{weights}-a8", implementation="lean")


def test_a_draft_of_four_bits_takes_the_faster_width_layer_by_layer(saved_model):
    path = saved_model("llama3")[1]
    runner = ModelRunner.load(path, num_blocks=2, block_size=16, quantization="int4-rotated")
    kernels = {bits: runner.with_activations_of(bits).linear_report() for bits in (0, 4, 16)}
    name = "model.layers.1.self_attn.o_proj"
    assert kernels[4][name].kernel == "native-int4-rotated-a4-emulated"
    assert kernels[16][name].kernel == runner.linear_report()[name].kernel
    assert kernels[0][name].kernel in ("native-int4-rotated-a8", "native-int4-rotated-a16")
    assert "µs with 8 bits and" in kernels[0][name].reason
    assert "8 native-int4-rotated-a4-emulated, 1 native-" in runner.with_activations_of(4).describe()
    rows = [SequenceRows(list(range(3, 20)), 0, range(2), 17)]
    logits = {bits: (r := runner.with_activations_of(bits)).forward(r.batch(rows)) for bits in (4, 8, 16)}
    errors = {bits: float((logits[bits] - logits[16]).abs().max()) for bits in (4, 8)}
    assert 0 < errors[8] < errors[4]


def test_the_probe_takes_what_is_faster(monkeypatch):
    packed = packing.pack_quantized(quantize(weight(), "nf4"), 16, None, Arena())
    for slow in probe.WIDTHS:
        multiply = library.Engine.linear

        def late(engine, linear, x, multiply=multiply, slow=slow):
            if linear.struct.activation_bits == slow:
                time.sleep(0.002)
            return multiply(engine, linear, x)

        monkeypatch.setattr(library.Engine, "linear", late)
        assert probe.WidthProbe(BEST).faster(packed.struct)[0] == sum(probe.WIDTHS) - slow
        monkeypatch.setattr(library.Engine, "linear", multiply)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"quantization": "int3"}}, "quantization must be one of"),
        ({"model": {"quantization": "none-a8"}}, "with -a8 behind it; not none-a8"),
        ({"model": {"quantization": "int8-a4"}}, "not int8-a4"),
        (
            {"speculation": {"draft": "self", "draft_quantization": "nf4-a8"}},
            "set by speculation.draft_activation_bits",
        ),
        ({"speculation": {"draft": "self", "draft_quantization": "none"}}, "a self-draft needs"),
        ({"speculation": {"draft": "ngram", "draft_quantization": "nf4"}}, "draft_quantization is for"),
        ({"speculation": {"draft": "qspec"}}, "draft qspec shares"),
        ({"speculation": {"draft": "oracle"}}, "unknown draft oracle"),
        ({"speculation": {"draft": "ngram", "draft_activation_bits": 8}}, "is for a self-draft or qspec"),
        (
            {"model": {"quantization": "nf4"}, "speculation": {"draft": "qspec", "draft_activation_bits": 2}},
            "must be 0, 4, 8 or 16",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        ClusterConfig.from_dict(changes)


@pytest.mark.parametrize("kind", ["nf4", "int4-rotated-outliers"])
def test_other_families_compute_with_rounded_weights(saved_model, kind):
    whole, path = saved_model("gemma2", True)
    runner = ModelRunner.load(path, num_blocks=8, block_size=16, quantization=kind)
    ids = list(range(3, 40))
    got = runner.forward(runner.batch([SequenceRows(ids, 0, range(3), 37)]))
    rounded = copy.deepcopy(whole)
    round_weights(rounded, kind)
    with torch.inference_mode():
        expected = rounded(torch.tensor([ids])).logits[0].float()
        assert not torch.allclose(whole(torch.tensor([ids])).logits[0].float(), got, atol=1e-3)
    assert torch.allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["nf4", "nf4-dq", "fp4", "int8"])
def test_bitsandbytes_executes_the_same_weights(kind):
    """As on a GPU, with the modules' own CPU code."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(1)
    layers = {"first": torch.nn.Linear(128, 64), "second": torch.nn.Linear(64, 64, bias=False)}
    whole = torch.nn.Sequential(OrderedDict(layers | {"lm_head": torch.nn.Linear(64, 9)}))
    theirs, rounded = copy.deepcopy(whole), copy.deepcopy(whole)
    report = swap_for_bitsandbytes(theirs, kind)
    assert {name: choice.kernel for name, choice in report.items()} == {
        "first": f"bitsandbytes-{kind}",
        "second": f"bitsandbytes-{kind}",
    }
    round_weights(rounded, kind)
    x = torch.randn(5, 128)
    with torch.inference_mode():
        got, expected = theirs.to("cpu")(x), rounded(x)
        assert not torch.allclose(whole(x), got, rtol=1e-3)
    error = (got - expected).abs().max() / expected.abs().max()
    assert error <= (2e-2 if kind == "int8" else 2e-3)  # its int8 product rounds activations, too


def test_bitsandbytes_has_no_integers_of_four_bits(saved_model):
    with pytest.raises(ConfigError, match="int4-rotated runs on a CPU only"):
        swap_for_bitsandbytes(saved_model("llama3")[0], "int4-rotated")


@pytest.fixture
def quantized_checkpoint(saved_model, tmp_path):
    """`make(kind)`: a model of bitsandbytes' modules, and the folder of what they save."""

    def make(kind):
        pytest.importorskip("bitsandbytes")
        whole, path = saved_model("llama3", True)
        model = copy.deepcopy(whole)
        swap_for_bitsandbytes(model, kind)
        model.to("cpu")
        tensors = {
            name: t.clone().contiguous() for name, t in model.state_dict().items() if name != "lm_head.weight"
        }
        save_file(tensors, tmp_path / "model.safetensors")
        settings = {
            "quant_method": "bitsandbytes",
            "load_in_8bit": kind == "int8",
            "load_in_4bit": kind != "int8",
        }
        settings |= {"bnb_4bit_quant_type": kind[:3], "llm_int8_skip_modules": ["lm_head"]}
        config = json.loads((path / "config.json").read_text()) | {"quantization_config": settings}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return model, tmp_path

    return make


def dequantize(model):
    """Give a model of bitsandbytes' 4-bit modules plain ones, with the numbers its weights stand for.

    As one row each: its AVX-512 code (0.50) reads wrong scales where a block of 64 goes on into a next row.
    """
    from bitsandbytes.functional import dequantize_4bit

    for name, module in list(model.named_modules()):
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is None:
            continue
        shape, state.shape = state.shape, torch.Size([1, state.shape.numel()])
        plain = torch.nn.Linear(shape[1], shape[0], bias=module.bias is not None)
        plain.weight.data = dequantize_4bit(module.weight.data, state).float().view(shape)
        if module.bias is not None:
            plain.bias.data = module.bias.data.float()
        model.set_submodule(name, plain)


@pytest.mark.parametrize("kind", ["nf4", "nf4-dq", "fp4", "int8"])
@pytest.mark.parametrize("implementation", ["native", "lean"])
def test_checkpoints_of_bitsandbytes_are_served(quantized_checkpoint, kind, implementation):
    model, folder = quantized_checkpoint(kind)
    runner = ModelRunner.load(folder, num_blocks=8, block_size=16, implementation=implementation)
    ids = list(range(3, 40))
    got = runner.forward(runner.batch([SequenceRows(ids, 0, range(3), 37)]))
    if kind != "int8":
        dequantize(model)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].float()
    error = (got - expected).abs().max() / expected.abs().max()
    assert error <= (2e-2 if kind == "int8" else 2e-3)  # its int8 product rounds activations, too
    if implementation == "native":
        assert runner.linear_report()["model.layers.0.mlp.gate_up_proj"].kernel.startswith(
            f"native-{kind[:3]}"
        )


def test_a_quantized_checkpoint_is_not_quantized_otherwise(quantized_checkpoint):
    folder = quantized_checkpoint("nf4")[1]
    with pytest.raises(ConfigError, match="is quantized in nf4; it cannot be served in int8"):
        ModelRunner.load(folder, num_blocks=2, block_size=16, quantization="int8")
    with pytest.raises(ConfigError, match="is quantized in nf4; it cannot be served in int8"):
        ModelRunner.load(folder, num_blocks=2, block_size=16, quantization="int8", activation_bits=8)
    narrow = ModelRunner.load(folder, num_blocks=2, block_size=16, quantization="nf4", activation_bits=8)
    assert "native-nf4-a8" in narrow.describe()
    draft = ModelRunner.load(folder, num_blocks=2, block_size=16, quantization="int8", is_draft=True)
    assert "native-int8" in draft.describe()


def test_a_damaged_quantized_checkpoint_is_refused(quantized_checkpoint):
    folder = quantized_checkpoint("nf4")[1]
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != f"{name}.quant_map"}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="is not a weight as bitsandbytes stores it"):
        ModelRunner.load(folder, num_blocks=2, block_size=16)
    tensors[name] = tensors[name][:-32]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="is not a weight as bitsandbytes stores it"):
        ModelRunner.load(folder, num_blocks=2, block_size=16)
