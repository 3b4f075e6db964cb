"""The name of a model build: what must be equal on both sides before KV may cross.

Two workers with the same fingerprint compute the same KV for the same tokens in the same layout, up to the
rounding of the dtype that each side holds it in, which is part of the fingerprint.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from tandem.config import ClusterConfig
from tandem.errors import ConfigError

KV_LAYOUT = "block,layer,kv,token,head,dim"
SAMPLES = 64
SAMPLE_BYTES = 4096


def model_fingerprint(config: ClusterConfig) -> bytes:
    """SHA-256 over settings, tokenizer, weights, what runs them on which kind of device, dtypes, KV layout
    and codec, block size.

    Weights count by their size, their header and 64 evenly spread samples of 4 KiB, so that a
    checkpoint of many gigabytes is named in milliseconds.
    """
    model, held = config.model, config.kv_dtypes
    storage = f"{model.dtype}|{model.implementation}|{model.linear}|{model.quantization}|{model.device_type}"
    digest = hashlib.sha256(
        f"v7|{storage}|{config.cache.block_size}|{KV_LAYOUT}|{config.kvstore.codec}"
        f"|{held.prefill}|{held.decode}".encode()
    )
    digest.update(checkpoint_digest(config.model.path))
    if config.speculation.draft_path is not None:
        digest.update(checkpoint_digest(config.speculation.draft_path))
    return digest.digest()


def checkpoint_digest(path: Path) -> bytes:
    """SHA-256 of what a checkpoint folder computes with. Raises `ConfigError` if it has no weights."""
    digest = hashlib.sha256()
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise ConfigError(f"no .safetensors weights in {path}; Tandem loads no other format")
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        if (path / name).is_file():
            digest.update(name.encode() + hashlib.sha256((path / name).read_bytes()).digest())
    for file in weights:
        digest.update(_weights_digest(file))
    return digest.digest()


def tokenizer_digest(path: Path) -> bytes:
    """SHA-256 of a checkpoint's tokenizer. Raises `ConfigError` if it has none."""
    file = path / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(f"no tokenizer.json in {path}")
    return hashlib.sha256(file.read_bytes()).digest()


def _weights_digest(file: Path) -> bytes:
    size = file.stat().st_size
    digest = hashlib.sha256(f"{file.name}|{size}".encode())
    with file.open("rb") as stream:
        for sample in range(SAMPLES):
            stream.seek(sample * max(size - SAMPLE_BYTES, 0) // (SAMPLES - 1))
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.digest()
