"""Linear weights of checkpoints that bitsandbytes quantized: read back to the numbers they stand for.

Quantizing those numbers again gives the same codes and scales, since the largest number of a group is its
scale. So a checkpoint needs no second path to the kernels: it is opened in single precision and packed in the
format that its config.json names. Layers whose groups run on into the next row stay in single precision.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Any

import torch

from tandem.engine.quantization.formats import INT8_MOST, nested_scales
from tandem.errors import ConfigError

PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB", ".weight_format")
STATE = ".quant_state.bitsandbytes__"
WHOLE = {"lm_head"}  # modules that bitsandbytes leaves alone, and so do we


def quantization_of(config: dict[str, Any]) -> str | None:
    """The format that config.json names; None if the weights are whole.

    Raises `ConfigError` for formats of other packages, and for modules left out of it other than the head.
    """
    given = config.get("quantization_config")
    if not given:
        return None
    if given.get("quant_method") != "bitsandbytes":
        method = given.get("quant_method", "an unnamed method")
        raise ConfigError(f"the weights are quantized by {method}; Tandem reads those of bitsandbytes only")
    others = set(given.get("llm_int8_skip_modules") or ()) - WHOLE
    if others:
        raise ConfigError(
            f"llm_int8_skip_modules leaves out {sorted(others)[0]}; only lm_head may be left out"
        )
    return str(given.get("bnb_4bit_quant_type", "fp4")) if given.get("load_in_4bit") else "int8"


def is_part(name: str) -> bool:
    """Whether a tensor belongs to a quantized weight of another name."""
    return name.endswith(PARTS) or STATE in name


def is_quantized(name: str, names: Collection[str]) -> bool:
    """Whether the weight of this name is stored as codes."""
    return f"{name}.absmax" in names or name.removesuffix("weight") + "SCB" in names


def dequantize(name: str, names: Collection[str], get: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """The weight `[out, in]` float32. Raises `ConfigError` for parts that do not fit each other."""
    try:
        scales = name.removesuffix("weight") + "SCB"
        if scales in names:
            return get(name).float() * (get(scales).float() / INT8_MOST)[:, None]
        return _four_bits(name, names, get)
    except (KeyError, ValueError, RuntimeError, IndexError, StopIteration) as error:
        raise ConfigError(f"{name} is not a weight as bitsandbytes stores it: {error!r}") from error


def _four_bits(name: str, names: Collection[str], get: Callable[[str], torch.Tensor]) -> torch.Tensor:
    key = next(part for part in names if part.startswith(f"{name}{STATE}"))
    state = json.loads(bytes(get(key).tolist()))
    packed, absmax = get(name).flatten(), get(f"{name}.absmax")
    if absmax.dtype == torch.uint8:
        levels, nested = get(f"{name}.nested_quant_map"), get(f"{name}.nested_absmax")
        absmax = nested_scales(absmax.flatten(), levels, nested, state["nested_offset"])
    codes = torch.stack((packed >> 4, packed & 15), 1).flatten()
    values = get(f"{name}.quant_map")[codes.long()].view(-1, state["blocksize"])
    return (values * absmax.view(-1, 1)).view(state["shape"]).float()
