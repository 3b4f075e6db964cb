"""Does it fit? The memory arithmetic of a model, from its config.json alone. No torch, no weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tandem.errors import ConfigError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
KV_CODECS = ("raw", "fp16", "int8", "int4")  # how KV travels (tandem.engine.kv_codec)


def num_blocks(num_tokens: int, block_size: int) -> int:
    """How many blocks hold that many tokens."""
    return -(-num_tokens // block_size)


@dataclass(frozen=True, slots=True)
class ModelGeometry:
    """The numbers of a decoder-only model that decide how much memory its KV cache takes."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_context: int  # tokens
    num_parameters: int  # estimated from the config; exact for the Llama family

    @classmethod
    def from_path(cls, path: Path) -> Self:
        """Read a checkpoint folder's config.json, or a config file itself.

        Raises `ConfigError` if it is missing or not a decoder-only model's.
        """
        file = path if path.is_file() else path / "config.json"
        try:
            return cls.from_config(json.loads(file.read_text()))
        except FileNotFoundError as error:
            raise ConfigError(
                f"no config.json in {path}; give a folder with a Hugging Face checkpoint"
            ) from error
        except json.JSONDecodeError as error:
            raise ConfigError(f"{file} is not valid JSON: {error.msg} at line {error.lineno}") from error

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build from a Hugging Face config as a dict. Raises `ConfigError` naming the missing key."""
        config = config.get("text_config", config)
        try:
            hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
            layers, vocab = int(config["num_hidden_layers"]), int(config["vocab_size"])
        except KeyError as error:
            raise ConfigError(
                f"config.json has no {error}; Tandem serves decoder-only models, whose configs have it"
            ) from error
        kv_heads = int(config.get("num_key_value_heads") or heads)
        head_dim = int(config.get("head_dim") or hidden // heads)
        ffn = int(config.get("intermediate_size") or 4 * hidden)
        per_layer = hidden * head_dim * (2 * heads + 2 * kv_heads) + 3 * hidden * ffn + 2 * hidden
        # Gemma's files leave the key out and mean yes; everybody else's mean no.
        tied = config.get("tie_word_embeddings", str(config.get("model_type")).startswith("gemma"))
        embeddings = vocab * hidden * (1 if tied else 2)
        return cls(
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            hidden_size=hidden,
            vocab_size=vocab,
            max_context=int(config.get("max_position_embeddings") or 2048),
            num_parameters=layers * per_layer + embeddings + hidden,
        )

    def kv_bytes_per_token(self, dtype: str) -> int:
        """2 · layers · kv_heads · head_dim · dtype_bytes."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE_BYTES[dtype]

    def kv_bytes(self, num_tokens: int, dtype: str, batch: int = 1) -> int:
        """KV bytes of `batch` sequences of `num_tokens` each, not rounded to blocks."""
        return batch * num_tokens * self.kv_bytes_per_token(dtype)

    def block_bytes(self, block_size: int, dtype: str) -> int:
        """Bytes of one block across all layers, keys and values."""
        return block_size * self.kv_bytes_per_token(dtype)

    def weights_bytes(self, dtype: str) -> int:
        return self.num_parameters * DTYPE_BYTES[dtype]
