"""The memory arithmetic against real checkpoints' config files and published sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.errors import ConfigError
from tandem.geometry import ModelGeometry, num_blocks

CONFIGS = Path(__file__).parent.parent / "data" / "configs"
GIB = 1 << 30

# Parameters as counted from the published checkpoints' tensors.
PUBLISHED = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "llama-3.1-8b": 8_030_261_248,
    "mistral-7b-v0.3": 7_248_023_552,
    "gemma-2-2b": 2_614_341_888,
    "olmo-2-7b": 7_298_617_344,
}
# Keys and values, 16 bits each, of one token.
KV_BYTES_PER_TOKEN = {
    "qwen3-0.6b": 2 * 28 * 8 * 128 * 2,
    "llama-3.1-8b": 131_072,
    "mistral-7b-v0.3": 131_072,
    "gemma-2-2b": 2 * 26 * 4 * 256 * 2,
    "olmo-2-7b": 524_288,
}
QWEN3_GIB_AT_32K = {
    "qwen3-0.6b": 3.50,
    "qwen3-1.7b": 3.50,
    "qwen3-4b": 4.50,
    "qwen3-8b": 4.50,
    "qwen3-14b": 5.00,
    "qwen3-32b": 8.00,
}
LLAMA = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 100,
}


def geometry(name: str) -> ModelGeometry:
    return ModelGeometry.from_config(json.loads((CONFIGS / f"{name}.json").read_text()))


@pytest.mark.parametrize(("name", "gib"), QWEN3_GIB_AT_32K.items())
@pytest.mark.parametrize("batch", [1, 2, 7, 64])
def test_qwen3_kv_at_32k_is_exact_and_linear_in_the_batch(name, gib, batch):
    assert geometry(name).kv_bytes(32_768, "bfloat16", batch) == batch * gib * GIB


@pytest.mark.parametrize(("name", "expected"), KV_BYTES_PER_TOKEN.items())
def test_kv_bytes_per_token(name, expected):
    assert geometry(name).kv_bytes_per_token("float16") == expected
    assert geometry(name).kv_bytes_per_token("float32") == 2 * expected


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_parameters_are_within_one_percent_of_the_published_count(name, published):
    assert geometry(name).num_parameters == pytest.approx(published, rel=0.01)
    assert geometry(name).weights_bytes("bfloat16") == 2 * geometry(name).num_parameters


@pytest.mark.parametrize("name", ["llama-3.1-8b", "mistral-7b-v0.3"])
def test_parameters_of_the_llama_family_are_exact(name):
    assert geometry(name).num_parameters == PUBLISHED[name]


def test_every_config_here_is_used():
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(PUBLISHED)


def test_head_dim_comes_from_the_config_where_it_is_not_the_quotient():
    gemma = geometry("gemma-2-2b")
    assert (gemma.head_dim, gemma.hidden_size // gemma.num_heads) == (256, 288)


def test_what_a_config_leaves_out_has_the_usual_meaning():
    found = ModelGeometry.from_config(LLAMA)
    assert (found.num_kv_heads, found.head_dim, found.max_context) == (4, 16, 2048)


def test_a_text_model_inside_a_larger_config_is_found():
    assert ModelGeometry.from_config({"text_config": LLAMA}) == ModelGeometry.from_config(LLAMA)


@pytest.mark.parametrize("key", sorted(LLAMA))
def test_a_missing_key_is_named(key):
    with pytest.raises(ConfigError, match=key):
        ModelGeometry.from_config({k: v for k, v in LLAMA.items() if k != key})


def test_a_folder_without_a_checkpoint_says_what_to_give(tmp_path):
    with pytest.raises(ConfigError, match="give a folder with a Hugging Face checkpoint"):
        ModelGeometry.from_path(tmp_path)
    (tmp_path / "config.json").write_text("{,}")
    with pytest.raises(ConfigError, match="not valid JSON"):
        ModelGeometry.from_path(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert ModelGeometry.from_path(tmp_path) == ModelGeometry.from_config(LLAMA)


@given(st.integers(0, 10**6), st.integers(1, 256))
def test_blocks_hold_the_tokens_and_one_fewer_would_not(num_tokens, block_size):
    blocks = num_blocks(num_tokens, block_size)
    assert blocks * block_size >= num_tokens > (blocks - 1) * block_size


@given(st.integers(1, 4096), st.sampled_from([1, 8, 16, 64]), st.sampled_from(["float32", "bfloat16"]))
def test_blocks_are_whole_tokens(num_tokens, block_size, dtype):
    model = geometry("qwen3-0.6b")
    rounded = num_blocks(num_tokens, block_size) * model.block_bytes(block_size, dtype)
    assert 0 <= rounded - model.kv_bytes(num_tokens, dtype) < model.block_bytes(block_size, dtype)
