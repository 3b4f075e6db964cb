"""What a Hugging Face checkpoint folder must be before Tandem opens it, read without transformers.

Weights come from safetensors only, and no code from the folder is ever run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tandem.errors import ConfigError


def read_config(path: Path) -> dict[str, Any]:
    """The folder's config.json. Refuses folders without safetensors and configs that name their own code."""
    config = _read_json(path / "config.json")
    if config is None:
        raise ConfigError(f"no config.json in {path}; give a folder with a Hugging Face checkpoint")
    if "auto_map" in config:
        raise ConfigError(
            f"{path / 'config.json'} names code of its own (auto_map); Tandem runs no code from checkpoints"
        )
    if not any(path.glob("*.safetensors")):
        raise ConfigError(f"no .safetensors file in {path}; convert the weights, pickled ones are not loaded")
    return config


def eos_token_ids(path: Path, config: dict[str, Any], default: int | None) -> frozenset[int]:
    """End-of-text ids from generation_config.json, or else from config.json, or else the architecture's."""
    for source in (_read_json(path / "generation_config.json") or {}, {"eos_token_id": default} | config):
        ids = source.get("eos_token_id")
        if ids is not None:
            return frozenset(ids if isinstance(ids, list) else [ids])
    return frozenset()


def _read_json(file: Path) -> dict[str, Any] | None:
    """None if there is no such file."""
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file} is not valid JSON: {error.msg} at line {error.lineno}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold a JSON object, not {type(content).__name__}")
    return content
