"""Weights and activations in bfloat16: what products are, and that a row's bits depend on the row alone."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.config import ClusterConfig, ModelConfig, SpeculationConfig
from tandem.engine.batch import SequenceRows
from tandem.engine.loading import load_engine
from tandem.engine.model_runner import ModelRunner
from tandem.engine.native import build, library
from tandem.engine.native.packing import pack_bf16
from tandem.errors import ConfigError
from tandem.fingerprint import model_fingerprint
from tandem.quantizations import parse_quantization

BEST = build.instruction_set()
TOKENS = [5, 90, 17, 101, 33, 8, 120, 64, 2, 77, 41]
TINY, HUGE = 2.0**-130, torch.finfo(torch.float32).max


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product(packed, x, threads=1, isa=BEST):
    return library.Engine(library.load(isa), threads).linear(packed, x)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 150),
    in_features=st.integers(1, 1200),
    out_features=st.integers(1, 90),
    has_bias=st.booleans(),
    threads=st.integers(1, 3),
)
def test_products_are_those_of_rounded_numbers(rows, in_features, out_features, has_bias, threads):
    weight, x = normal(out_features, in_features), normal(rows, in_features, seed=1)
    bias = normal(out_features, seed=2) if has_bias else None
    packed = pack_bf16(weight, bias)
    got = product(packed, x, threads)
    exact = x.bfloat16().double() @ weight.bfloat16().double().T + (0 if bias is None else bias.double())
    assert (got - exact).abs().max() <= 1e-6 * math.sqrt(in_features) * max(1.0, float(exact.abs().max()))
    for row in {0, rows // 2, rows - 1}:
        assert torch.equal(product(packed, x[row : row + 1].contiguous())[0], got[row])


def test_numbers_are_rounded_as_torch_rounds_them():
    """But for what is too small for a normal float, which counts as zero on every processor."""
    middles = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 1 - 2**-9, 1 - 2**-9 - 2**-20])
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, HUGE, TINY, -TINY])
    for x in (normal(4, 64) * 2.0 ** normal(4, 64, seed=1).mul(20).round(), middles, special):
        x = x.reshape(-1, 1).contiguous()
        expected = torch.where(x.abs() < torch.finfo(torch.float32).tiny, 0.0, x).bfloat16().float()
        one = torch.ones(1, 1)
        assert torch.equal(product(pack_bf16(one), x).nan_to_num(7), expected.nan_to_num(7))
        for number in x:
            assert torch.equal(
                product(pack_bf16(number.view(1, 1)), one).nan_to_num(7),
                number.where(number.abs() >= torch.finfo(torch.float32).tiny, 0.0)
                .where(~number.isnan(), math.nan)
                .bfloat16()
                .float()
                .view(1, 1)
                .nan_to_num(7),
            )


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 11, 60])
@pytest.mark.parametrize("in_features", [64, 301])
def test_every_instruction_set_gives_the_same_bits(other_isa, rows, in_features):
    packed, x = pack_bf16(normal(70, in_features)), normal(rows, in_features, seed=1)
    assert torch.equal(product(packed, x, isa=other_isa), product(packed, x))


def load(path, quantization="bf16", **options):
    return ModelRunner.load(path, quantization=quantization, num_blocks=8, block_size=4, **options)


def logits(model, *cuts):
    """Of all tokens, which come in these pieces, with an other sequence beside them."""
    found, table, other = [], [1, 3, 5, 7], [0, 2]
    for start, end in zip((0, *cuts), (*cuts, len(TOKENS)), strict=True):
        rows = SequenceRows(TOKENS[start:end], start, table, end - start)
        batch = [rows, SequenceRows(TOKENS[:3], 0, other, 1)] if start else [rows]
        found.append(model.forward(model.batch(batch))[: end - start].clone())
    return torch.cat(found)


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_a_model_has_the_same_bits_however_its_tokens_come(saved_model, name):
    model = load(saved_model(name)[1])
    kernels = {name: choice.kernel for name, choice in model.linear_report().items()}
    assert {kernel for name, kernel in kernels.items() if name != "lm_head"} == {"native-bf16"}
    whole = logits(model)
    assert torch.equal(logits(model, 1, 2, 3, 7), whole)
    plain = logits(load(saved_model(name)[1], "none"))
    difference = (whole.softmax(-1) - plain.softmax(-1)).abs().max()
    assert 0 < difference < 0.02


def config(path, **parts):
    return ClusterConfig(model=ModelConfig(path=path, quantization="bf16"), **parts)


def test_it_needs_our_own_kernels(saved_model, monkeypatch):
    path = saved_model("llama3")[1]
    with pytest.raises(ConfigError, match=r"bf16 needs our own kernels, and .* runs by lean here"):
        load(path, implementation="lean")
    monkeypatch.setenv("TANDEM_NATIVE", "off")
    with pytest.raises(ConfigError, match="TANDEM_NATIVE is off"):
        load_engine(config(path), "decode", 1 << 20, 1)


def test_its_kv_is_not_that_of_whole_weights(saved_model):
    bf16 = config(saved_model("llama3")[1])
    whole = dataclasses.replace(bf16, model=dataclasses.replace(bf16.model, quantization="none"))
    assert model_fingerprint(bf16) != model_fingerprint(whole)


def test_what_makes_no_sense_is_refused(saved_model):
    assert parse_quantization("bf16") == ("bf16", 16)
    with pytest.raises(ConfigError, match="not bf16-a8"):
        parse_quantization("bf16-a8")
    with pytest.raises(ConfigError, match="in bf16 it costs what a target costs"):
        SpeculationConfig(draft="self", draft_quantization="bf16")
