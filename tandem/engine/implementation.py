"""What would run a checkpoint's forward on this machine, found out without loading torch.

`native`: own C++ kernels (Llama family, float32 activations on a CPU). `lean`: the same architectures by
torch. `transformers`: its own modules, for everything else. Their KV differs in the last bits, so all workers
of a service use one; `settle` fixes it before they start.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tandem.config import IMPLEMENTATIONS, ClusterConfig
from tandem.engine.checkpoint import read_config
from tandem.engine.lean.config import LeanConfig, NotLeanError
from tandem.engine.native import build
from tandem.errors import ConfigError

VECTOR = 8  # head dimensions come in whole vectors of the kernels


def choose(path: Path, raw: dict[str, Any], wanted: str, dtype: str, device: str) -> tuple[str, str]:
    """The implementation and why. Builds the kernels if they are to run.

    Raises `ConfigError` if the one asked for cannot run this checkpoint here.
    """
    if wanted not in IMPLEMENTATIONS:
        raise ConfigError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, not {wanted}")
    if wanted == "transformers":
        return wanted, "asked for"
    try:
        if dtype != "float32" or device != "cpu":
            raise NotLeanError("the lean decoder computes in float32 on a CPU")
        config = LeanConfig.parse(raw)
    except NotLeanError as error:
        if wanted != "auto":
            raise ConfigError(f"{path} needs implementation transformers: {error}") from error
        return "transformers", str(error)
    if wanted == "lean":
        return wanted, "asked for"
    try:
        isa = build.instruction_set()
        if config.geometry.head_dim % VECTOR:
            raise build.NotNativeError(f"head_dim {config.geometry.head_dim} is no multiple of {VECTOR}")
        build.library(isa)
    except build.NotNativeError as error:
        if wanted == "native":
            raise ConfigError(f"implementation native cannot run here: {error}") from error
        return "lean", f"no own kernels: {error}"
    return "native", f"kernels for {isa}"


def settle(config: ClusterConfig) -> ClusterConfig:
    """The same settings with `auto` replaced by what runs here, where all workers are to run the same."""
    model = config.model
    if model.implementation != "auto":
        return config
    name, _ = choose(model.path, read_config(model.path), "auto", model.dtype, model.device_type)
    return replace(config, model=replace(model, implementation=name))
