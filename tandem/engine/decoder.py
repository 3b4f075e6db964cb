"""What runs a forward: the lean decoder where it knows the architecture, transformers' modules otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from tandem.engine.batch import ForwardBatch
from tandem.engine.checkpoint import read_config
from tandem.engine.lean.config import LeanConfig, NotLeanError
from tandem.engine.lean.decoder import LeanDecoder
from tandem.engine.linear import LinearChoice
from tandem.engine.paged_cache import PagedCache
from tandem.errors import ConfigError

IMPLEMENTATIONS = ("auto", "lean", "transformers")


class Decoder(Protocol):
    """The weights and kernels of a model. Holds no state of a forward."""

    implementation: str
    reason: str  # why this one runs
    eos_token_ids: frozenset[int]
    linears: dict[str, LinearChoice]

    def forward(self, batch: ForwardBatch, cache: PagedCache) -> torch.Tensor:
        """Fill the cache with the batch's rows; `[num_logits_rows, vocab]` of the rows asked for."""


def load_decoder(
    path: Path, dtype: torch.dtype, linear: str, device: torch.device | str, implementation: str
) -> Decoder:
    """Open a local checkpoint. Raises `ConfigError` for what cannot be served."""
    if implementation not in IMPLEMENTATIONS:
        raise ConfigError(f"implementation must be one of {IMPLEMENTATIONS}, not {implementation}")
    raw = read_config(path)
    reason = "asked for"
    if implementation != "transformers":
        try:
            if dtype != torch.float32 or torch.device(device).type != "cpu":
                raise NotLeanError("the lean decoder computes in float32 on a CPU")
            config = LeanConfig.parse(raw)
        except NotLeanError as error:
            if implementation == "lean":
                raise ConfigError(f"{path} needs implementation transformers: {error}") from error
            reason = str(error)
        else:
            return LeanDecoder.load(path, config, raw, linear, "it knows this architecture")
    from tandem.engine.transformers_decoder import TransformersDecoder  # two seconds and more to import

    return TransformersDecoder.load(path, dtype, linear, device, reason)
