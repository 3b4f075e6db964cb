"""Builds that could compute other KV have another name; a copy of the same build has the same."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tandem.config import CacheConfig, ClusterConfig, ModelConfig
from tandem.errors import ConfigError
from tandem.fingerprint import SAMPLE_BYTES, SAMPLES, model_fingerprint
from tests.checkpoints import tiny_llama


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(tiny_llama(), tmp_path / "model"))


def name_of(path: Path, **changes) -> bytes:
    config = ClusterConfig(model=ModelConfig(path=path))
    return model_fingerprint(replace(config, **changes))


def test_a_copy_has_the_same_name_wherever_it_lies(folder):
    assert name_of(folder) == name_of(tiny_llama())
    assert len(name_of(folder)) == 32


def test_what_does_not_change_kv_does_not_change_the_name(folder):
    before = name_of(folder)
    (folder / "README.md").write_text("about this model")
    assert name_of(folder, model=ModelConfig(path=folder, name="another name")) == before
    assert name_of(folder, cache=CacheConfig(prefill_bytes=1 << 20)) == before


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer.json"])
def test_any_change_of_a_setting_changes_the_name(folder, file):
    before, path = name_of(folder), folder / file
    path.write_text(path.read_text() + " ")
    changed = name_of(folder)
    path.unlink()
    assert len({before, changed, name_of(folder)}) == 3


@pytest.mark.parametrize("sample", [0, 1, SAMPLES // 2, SAMPLES - 1])
@pytest.mark.parametrize("offset", [0, SAMPLE_BYTES - 1])
def test_any_sampled_byte_of_the_weights_changes_the_name(folder, sample, offset):
    before, path = name_of(folder), folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[sample * (len(data) - SAMPLE_BYTES) // (SAMPLES - 1) + offset] ^= 1
    path.write_bytes(data)
    assert name_of(folder) != before


def test_every_byte_of_small_weights_is_sampled(folder):
    path = folder / "model.safetensors"
    small = bytes(range(256)) * (SAMPLES - 1) * SAMPLE_BYTES
    for size in (1, SAMPLE_BYTES, SAMPLE_BYTES + 1, (SAMPLES - 1) * SAMPLE_BYTES):
        data = bytearray(small[:size])
        path.write_bytes(data)
        before = name_of(folder)
        for at in {0, size // 3, size // 2, size - 1}:
            data[at] ^= 1
            path.write_bytes(data)
            assert name_of(folder) != before, (size, at)
            data[at] ^= 1


def test_the_size_and_the_cut_of_the_weights_count(folder):
    before, path = name_of(folder), folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    longer = name_of(folder)
    path.rename(folder / "model-00001-of-00001.safetensors")
    renamed = name_of(folder)
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"more")
    assert len({before, longer, renamed, name_of(folder)}) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"cache": CacheConfig(block_size=32)},
        {"model": {"dtype": "bfloat16"}},
        {"model": {"linear": "fp16"}},
    ],
)
def test_precision_and_layout_count(folder, changes):
    if isinstance(model := changes.get("model"), dict):
        changes = {"model": ModelConfig(path=folder, **model)}
    assert name_of(folder, **changes) != name_of(folder)


def test_a_folder_without_weights_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="safetensors"):
        name_of(tmp_path)
