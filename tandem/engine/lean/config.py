"""What the lean decoder needs to know of a checkpoint, from config.json alone, or why it cannot run it.

Reads the keys as transformers does, its defaults for missing ones included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tandem.geometry import ModelGeometry

ROPE_TYPES = ("default", "linear", "llama3")
CAUSAL_ONLY = ("is_encoder_decoder", "use_bidirectional_attention")


class NotLeanError(Exception):
    """The checkpoint needs something that the lean decoder does not compute; the message says what."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """How a family differs from Llama."""

    qkv_bias: bool | None = None  # None: as `attention_bias` says, and then the output projection has one too
    mlp_bias: bool = False  # whether `mlp_bias` counts
    norm_after: bool = False  # normalize what attention and FFN return, not what they are given
    plain_norm: bool = False  # LayerNorm without weights
    qk_norm: str = ""  # "head": over each head, "all": over all heads together
    window: str = ""  # "all": every layer has `sliding_window`, "some": as `layer_types` says
    norm_eps: float = 1e-6  # if config.json has none
    eos_token_id: int | None = None  # if config.json has none


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(mlp_bias=True, eos_token_id=2),
    "MistralForCausalLM": Architecture(qkv_bias=False, window="all", eos_token_id=2),
    "Qwen2ForCausalLM": Architecture(qkv_bias=True, window="some"),
    "Qwen3ForCausalLM": Architecture(qk_norm="head", window="some"),
    "OlmoForCausalLM": Architecture(plain_norm=True, eos_token_id=50279),
    "Olmo2ForCausalLM": Architecture(norm_after=True, qk_norm="all", norm_eps=1e-5, eos_token_id=50279),
}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding whose frequencies are fixed. `factor` 1 scales nothing."""

    theta: float
    factor: float = 1.0
    low_freq_factor: float | None = None  # with the two below: llama3's interpolation
    high_freq_factor: float = 4.0
    original_context: int = 0


@dataclass(frozen=True, slots=True)
class LeanConfig:
    """One decoder, fully specified."""

    architecture: Architecture
    geometry: ModelGeometry
    intermediate_size: int
    norm_eps: float
    rope: RopeConfig
    windows: tuple[int | None, ...]  # per layer
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    clip_qkv: float | None
    tied: bool

    @classmethod
    def parse(cls, config: dict[str, Any]) -> LeanConfig:
        """Raises `NotLeanError` for what only transformers can run."""
        names = config.get("architectures") or ["no architecture"]
        if len(names) != 1 or names[0] not in ARCHITECTURES:
            raise NotLeanError(f"{names[0]} is not in the lean decoder")
        _check(config)
        known = ARCHITECTURES[names[0]]
        geometry = ModelGeometry.from_config(config)
        bias = bool(config.get("attention_bias", False))
        return cls(
            architecture=known,
            geometry=geometry,
            intermediate_size=int(config["intermediate_size"]),
            norm_eps=1e-5 if known.plain_norm else float(config.get("rms_norm_eps", known.norm_eps)),
            rope=_rope(config, geometry),
            windows=_windows(config, known, geometry.num_layers),
            qkv_bias=bias if known.qkv_bias is None else known.qkv_bias,
            output_bias=bias if known.qkv_bias is None else False,
            mlp_bias=known.mlp_bias and bool(config.get("mlp_bias", False)),
            clip_qkv=config.get("clip_qkv") if known.plain_norm else None,
            tied=bool(config.get("tie_word_embeddings", False)),
        )


def _check(config: dict[str, Any]) -> None:
    if (config.get("quantization_config") or {}).get("quant_method", "bitsandbytes") != "bitsandbytes":
        raise NotLeanError("the weights are quantized by another method than bitsandbytes")
    if any(config.get(key) for key in CAUSAL_ONLY):
        raise NotLeanError("attention is not causal")
    if config.get("hidden_act", "silu") != "silu":
        raise NotLeanError(f"the activation is {config['hidden_act']}, not silu")
    if "intermediate_size" not in config:
        raise NotLeanError("config.json has no intermediate_size")


def _rope(config: dict[str, Any], geometry: ModelGeometry) -> RopeConfig:
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if any(isinstance(value, dict) for value in given.values()):
        raise NotLeanError("rope differs between layers")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise NotLeanError(f"rope type {kind} is not in the lean decoder")
    if given.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise NotLeanError("rope turns a part of each head only")
    theta = float(given.get("rope_theta", config.get("rope_theta", 10_000.0)))
    if kind == "default":
        return RopeConfig(theta)
    try:
        factor = float(given["factor"])
        if kind == "linear":
            return RopeConfig(theta, factor)
        original = config.get("original_max_position_embeddings") or given.get(
            "original_max_position_embeddings", geometry.max_context
        )
        low, high = float(given["low_freq_factor"]), float(given["high_freq_factor"])
        return RopeConfig(theta, factor, low, high, int(original))
    except KeyError as error:
        raise NotLeanError(f"rope type {kind} has no {error}") from error


def _windows(config: dict[str, Any], known: Architecture, num_layers: int) -> tuple[int | None, ...]:
    types = config.get("layer_types")
    window = config.get("sliding_window", 4096)
    if known.window == "some":
        window = window if config.get("use_sliding_window", False) else None
        if types is None:
            first = math.inf if window is None else config.get("max_window_layers", 28)
            types = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
        if len(types) == num_layers and set(types) <= {"sliding_attention", "full_attention"}:
            return tuple(window if kind == "sliding_attention" else None for kind in types)
    elif types is None or set(types) == {"full_attention"}:
        return (window if known.window == "all" else None,) * num_layers
    raise NotLeanError("layer_types names kinds of attention that the lean decoder does not mix")
