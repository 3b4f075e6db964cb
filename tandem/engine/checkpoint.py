"""Opens a Hugging Face checkpoint from a local folder, or says why Tandem cannot serve it.

Weights come from safetensors only, and no code from the folder is ever run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from tandem.engine import attention
from tandem.errors import ConfigError

LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


def load_model(path: Path, dtype: torch.dtype, device: torch.device | str) -> PreTrainedModel:
    """The model in evaluation mode, wired to the paged attention. Raises `ConfigError`."""
    check_files(path)
    _quiet()
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        check_config(config)
        model = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=attention.NAME,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} cannot be loaded as a decoder-only model: {error}") from error
    module: torch.nn.Module = model
    module.to(device).requires_grad_(False).train(False)
    return model


def _quiet() -> None:
    """No progress bars: a worker's standard error is a log."""
    disable: Callable[[], None] = transformers_logging.disable_progress_bar
    disable()


def check_files(path: Path) -> None:
    """Refuse folders without safetensors and configs that name code of their own."""
    file = path / "config.json"
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise ConfigError(
            f"no config.json in {path}; give a folder with a Hugging Face checkpoint"
        ) from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file} is not valid JSON: {error.msg} at line {error.lineno}") from error
    if "auto_map" in config:
        raise ConfigError(f"{file} names code of its own (auto_map); Tandem runs no code from checkpoints")
    if not any(path.glob("*.safetensors")):
        raise ConfigError(f"no .safetensors file in {path}; convert the weights, pickled ones are not loaded")


def check_config(config: PreTrainedConfig) -> None:
    """Refuse what the paged attention cannot compute exactly, by the name of the setting."""
    other = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if other:
        raise ConfigError(f"layer types {sorted(other)} are not supported, only {sorted(LAYER_TYPES)}")
    rope = getattr(config, "rope_parameters", None) or {}
    bad = LENGTH_DEPENDENT_ROPE & set(_rope_types(rope))
    if bad:
        raise ConfigError(
            f"rope type {sorted(bad)[0]} makes a token's keys depend on the length of other sequences; "
            "set a fixed rope scaling in config.json"
        )
    if getattr(config, "use_bidirectional_attention", False) or getattr(config, "is_encoder_decoder", False):
        raise ConfigError("only decoder-only models with causal attention are supported")


def _rope_types(parameters: dict[str, Any]) -> list[str]:
    nested = [p for p in parameters.values() if isinstance(p, dict)]
    return [str(p.get("rope_type", "default")) for p in (nested or [parameters])]


def eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """End-of-text ids from the generation config, or else from the model's."""
    for config in (model.generation_config, model.config):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return frozenset(ids if isinstance(ids, list | tuple) else [ids])
    return frozenset()
