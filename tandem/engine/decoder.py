"""What runs a forward. For the Llama family own C++ kernels, or torch where they cannot run; for every other
architecture transformers' modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from tandem.engine.batch import SequenceRows
from tandem.engine.checkpoint import read_config
from tandem.engine.implementation import choose
from tandem.engine.lean.config import LeanConfig
from tandem.engine.lean.decoder import LeanDecoder
from tandem.engine.linear import LinearChoice
from tandem.engine.native.decoder import NativeDecoder
from tandem.engine.paged_cache import PagedCache
from tandem.engine.quantization.bitsandbytes import quantization_of
from tandem.engine.storage import Storage
from tandem.errors import ConfigError
from tandem.quantizations import AUTO_DRAFT


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
    path: Path,
    dtype: torch.dtype,
    storage: Storage,
    device: torch.device | str,
    implementation: str,
) -> Decoder:
    """Open a local checkpoint. Raises `ConfigError` for what cannot be served."""
    raw = read_config(path)
    dtype_name, device_name = str(dtype).removeprefix("torch."), torch.device(device).type
    storage = _as_stored(storage, quantization_of(raw), path)
    name, reason = choose(path, raw, implementation, dtype_name, device_name)
    if storage.quantization == "bf16" and name != "native":
        raise ConfigError(f"bf16 needs our own kernels, and {path} runs by {name} here ({reason}): take none")
    if name == "native":
        return NativeDecoder.load(path, LeanConfig.parse(raw), raw, storage)
    if name == "lean":
        return LeanDecoder.load(path, LeanConfig.parse(raw), raw, storage, reason)
    if storage.is_given:
        raise ConfigError(f"a quantized checkpoint must be of the Llama family, and run on a CPU: {reason}")
    from tandem.engine.transformers_decoder import TransformersDecoder  # two seconds and more to import

    return TransformersDecoder.load(path, dtype, storage, device, reason)


def best_for_draft(path: Path, implementation: str, dtype: str, device: str = "cpu") -> str:
    """The quantization with which a draft model is fastest and agrees about as often: eight bits, activations
    too, where own kernels run it; as it comes elsewhere, and if it is quantized already."""
    raw = read_config(path)
    if quantization_of(raw) is not None:
        return "none"
    name, _ = choose(path, raw, implementation, dtype, torch.device(device).type)
    return AUTO_DRAFT if name == "native" else "none"


def _as_stored(storage: Storage, found: str | None, path: Path) -> Storage:
    """A checkpoint that is quantized stays as it is; a draft in another format may be made of it."""
    if found is None or storage.is_draft:
        return storage
    if storage.quantization.partition("-")[0] not in ("none", found):
        raise ConfigError(f"{path} is quantized in {found}; it cannot be served in {storage.quantization}")
    return replace(storage, quantization=found, is_given=True)
