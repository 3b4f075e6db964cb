"""A grown model is larger and computes the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.inflate import BUNDLED, SIZES, Size, grow, inflated_pair, place_heads, write_pair
from tandem.engine.batch import SequenceRows
from tandem.engine.model_runner import ModelRunner
from tandem.errors import ConfigError
from tandem.geometry import ModelGeometry

LARGEST_DIFFERENCE = 1e-4
NEW_TOKENS = 12
PROMPTS = ("def fibonacci(n):", "import os\n\ndef read_lines(path):\n", "class Stack:\n")
TARGETS = {
    "fewer heads per KV head": Size(12, 480, 15, 5, 768),
    "more heads per KV head": Size(11, 512, 16, 2, 704),
    "as many heads per KV head": Size(10, 576, 16, 4, 1024),
}
DRAFT = Size(4, 192, 6, 3, 400)


def prompt_ids() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED.target)
    return [tokenizer(text)["input_ids"] for text in PROMPTS]


def continuations(model) -> list[list[int]]:
    out = []
    for ids in prompt_ids():
        tensor = torch.tensor([ids])
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        out.append(model.generate(tensor, attention_mask=torch.ones_like(tensor), **options)[0].tolist())
    return out


@torch.inference_mode()
def assert_computes_the_same(grown: Path, source: Path) -> None:
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (grown, source)
    )
    ids = torch.tensor([[token for ids in prompt_ids() for token in ids]])
    difference = (ours(ids).logits - theirs(ids).logits).abs().max().item()
    assert difference < LARGEST_DIFFERENCE
    assert continuations(ours) == continuations(theirs)


@pytest.mark.parametrize("size", TARGETS.values(), ids=TARGETS)
def test_a_grown_target_computes_the_same(tmp_path, size) -> None:
    grow(BUNDLED.target, size, tmp_path / "grown")
    assert_computes_the_same(tmp_path / "grown", BUNDLED.target)


def test_a_grown_draft_computes_the_same(tmp_path) -> None:
    grow(BUNDLED.draft, DRAFT, tmp_path / "grown")
    assert_computes_the_same(tmp_path / "grown", BUNDLED.draft)


@torch.inference_mode()
def test_the_engine_agrees_with_itself_on_a_grown_target(tmp_path) -> None:
    grow(BUNDLED.target, TARGETS["fewer heads per KV head"], tmp_path / "grown")
    logits = []
    for path in (tmp_path / "grown", BUNDLED.target):
        model = ModelRunner.load(path, num_blocks=8, block_size=16)
        rows = SequenceRows(prompt_ids()[1], 0, range(8), num_logits=5)
        logits.append(model.forward(model.batch([rows])))
    assert (logits[0] - logits[1]).abs().max().item() < LARGEST_DIFFERENCE
    assert torch.equal(logits[0].argmax(-1), logits[1].argmax(-1))


def test_trained_matrices_stay_in_half_precision_without_loss(tmp_path) -> None:
    size = Size(12, 512, 16, 2, 704)
    grow(BUNDLED.target, size, tmp_path / "grown")
    old = load_file(BUNDLED.target / "model.safetensors")
    new = {name: value for file in tmp_path.rglob("*.safetensors") for name, value in load_file(file).items()}
    name = "model.layers.3.mlp.down_proj.weight"
    assert new[name].dtype == torch.float16
    assert torch.equal(new[name][:256, :704], old[name])
    idle = [new[f"model.layers.{layer}.self_attn.o_proj.weight"] for layer in (10, 11)]
    assert not any(weight.any() for weight in idle)
    assert not torch.equal(*(weight.signbit() for weight in idle)), "equal matrices may be stored once"
    assert new["model.layers.10.self_attn.q_proj.weight"].any()


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.integers(0, 6))
def test_each_query_head_finds_its_own_keys(kv_heads, group, new_group, spare) -> None:
    copies = -(-group // new_group)
    new_kv = kv_heads * copies + spare
    old = ModelGeometry(1, kv_heads * group, kv_heads, 8, 8, 8, 8, 0)
    queries, keys = place_heads(old, Size(1, 8, new_kv * new_group, new_kv, 8))
    keys_at = dict(keys)
    assert sorted(old for _, old in queries) == list(range(old.num_heads))
    assert len({new for new, _ in queries}) == old.num_heads
    for new_head, old_head in queries:
        assert keys_at[new_head // new_group] == old_head // group


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (Size(9, 320, 10, 5, 768), "num_hidden_layers"),
        (Size(10, 128, 10, 5, 704), "hidden_size"),
        (Size(10, 320, 10, 4, 704), "no multiple"),
        (Size(10, 320, 9, 3, 704), "copies"),
    ],
)
def test_what_cannot_be_grown_is_refused(tmp_path, size, said) -> None:
    with pytest.raises(ConfigError, match=said):
        grow(BUNDLED.target, size, tmp_path / "grown")
    assert not (tmp_path / "grown").exists()


def test_a_folder_that_is_there_is_not_overwritten(tmp_path) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        grow(BUNDLED.draft, DRAFT, tmp_path)


@pytest.mark.parametrize("to", SIZES)
def test_a_draft_is_a_tenth_of_its_target(to) -> None:
    config = json.loads((BUNDLED.target / "config.json").read_text())
    counts = []
    for size in SIZES[to]:
        grown = {"num_hidden_layers": size.layers, "hidden_size": size.hidden, "head_dim": 32}
        heads = {"num_attention_heads": size.heads, "num_key_value_heads": size.kv_heads}
        stated = config | grown | heads | {"intermediate_size": size.ffn}
        counts.append(ModelGeometry.from_config(stated).num_parameters)
    named = {"111m": 111e6, "1b": 1e9, "8b": 8e9}[to]
    assert 0.86 < counts[0] / named <= 1  # the vocabulary stays small
    assert counts[1] / counts[0] == pytest.approx(0.1, rel=0.05)


@pytest.fixture
def small(monkeypatch) -> str:
    """The name of a pair that is only a little larger than the bundled one."""
    monkeypatch.setitem(SIZES, "small", (TARGETS["more heads per KV head"], DRAFT))
    return "small"


def test_a_pair_is_made_once(tmp_path, monkeypatch, small) -> None:
    monkeypatch.setattr("bench.inflate.cache_folder", lambda: tmp_path / "cache")
    pair = inflated_pair(small)
    stamps = [path.stat().st_mtime_ns for path in pair]
    assert inflated_pair(small) == pair
    assert [path.stat().st_mtime_ns for path in pair] == stamps


@pytest.mark.long
def test_the_pair_of_the_benchmark_computes_the_same(tmp_path) -> None:
    for grown, source in zip(write_pair("111m", tmp_path / "pair"), BUNDLED, strict=True):
        assert_computes_the_same(grown, source)


def test_a_pair_is_written_where_it_is_wanted(tmp_path, small) -> None:
    pair = write_pair(small, tmp_path / "pair")
    assert pair.target == tmp_path / "pair" / "target"
    assert all((path / "tokenizer.json").is_file() for path in pair)
