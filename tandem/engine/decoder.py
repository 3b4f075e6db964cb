"""What runs a forward. For the Llama family own C++ kernels, or torch where they cannot run; for every other
architecture transformers' modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from tandem.engine.batch import SequenceRows
from tandem.engine.checkpoint import read_config
from tandem.engine.lean.config import LeanConfig, NotLeanError
from tandem.engine.lean.decoder import LeanDecoder
from tandem.engine.linear import LinearChoice
from tandem.engine.native.build import NotNativeError
from tandem.engine.native.decoder import NativeDecoder
from tandem.engine.paged_cache import PagedCache
from tandem.errors import ConfigError

IMPLEMENTATIONS = ("auto", "native", "lean", "transformers")


class Batch(Protocol):
    """Rows that were indexed by the decoder which runs them."""

    @property
    def num_rows(self) -> int: ...

    @property
    def padded_rows(self) -> int:
        """Rows of attention that carry no token."""


class Decoder(Protocol):
    """The weights and kernels of a model. Holds no state of a forward."""

    implementation: str
    reason: str  # why this one runs
    eos_token_ids: frozenset[int]
    linears: dict[str, LinearChoice]

    def batch(self, sequences: Sequence[SequenceRows], cache: PagedCache) -> Batch:
        """Index one forward over these rows: what `forward` takes."""

    def forward(self, batch: Any, cache: PagedCache) -> torch.Tensor:
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
            if implementation != "auto":
                raise ConfigError(f"{path} needs implementation transformers: {error}") from error
            reason = str(error)
        else:
            return _known_family(path, config, raw, linear, implementation)
    from tandem.engine.transformers_decoder import TransformersDecoder  # two seconds and more to import

    return TransformersDecoder.load(path, dtype, linear, device, reason)


def _known_family(
    path: Path, config: LeanConfig, raw: dict[str, Any], linear: str, implementation: str
) -> Decoder:
    """By own kernels where they can run, else by torch's."""
    reason = "asked for"
    if implementation != "lean":
        try:
            return NativeDecoder.load(path, config, raw, linear)
        except NotNativeError as error:
            if implementation == "native":
                raise ConfigError(f"implementation native cannot run here: {error}") from error
            reason = f"no own kernels: {error}"
    return LeanDecoder.load(path, config, raw, linear, reason)
