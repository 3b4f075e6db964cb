"""Checkpoints of a given shape with random weights, for speed alone: made once, kept in the user's cache."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.inflate import BUNDLED
from tandem.engine.checkpoint import read_config
from tandem.engine.lean.config import LeanConfig
from tandem.engine.lean.shapes import tensor_shapes
from tandem.engine.native.build import cache_folder
from tandem.errors import ConfigError

STD = 0.02
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
VERSION = 1  # of what this module writes


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama, in the words of its config.json."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int


SHAPES = {
    "111m": Shape(30, 576, 9, 3, 1536, 8192),
    "1b": Shape(16, 2048, 32, 8, 8192, 128256),  # Llama 3.2 1B
}


def checkpoint(name: str) -> Path:
    """A folder with that shape's checkpoint in half precision; `raw` is the bundled target as it is.

    The tokenizer is the bundled one: token ids beyond it have no text. Raises `ConfigError` for other names.
    """
    if name == "raw":
        return BUNDLED.target
    if name not in SHAPES:
        raise ConfigError(f"unknown shape {name}; known: raw, {', '.join(SHAPES)}")
    place = cache_folder() / "shapes" / f"{name}-{VERSION}"
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
            folder = Path(scratch) / "model"
            _write(SHAPES[name], folder)
            folder.rename(place)
    return place


def _write(shape: Shape, folder: Path) -> None:
    folder.mkdir()
    config = read_config(BUNDLED.target) | asdict(shape) | {"torch_dtype": "float16", "dtype": "float16"}
    config |= {"max_position_embeddings": 4096, "tie_word_embeddings": True}
    config["head_dim"] = shape.hidden_size // shape.num_attention_heads
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.ones(size) if len(size) == 1 else STD * torch.randn(size, generator=generator)
        for name, size in tensor_shapes(LeanConfig.parse(config))
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(
        {name: tensor.half() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    for name in TOKENIZER:
        shutil.copy(BUNDLED.target / name, folder)
