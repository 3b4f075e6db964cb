"""The Llama family by own C++ kernels: one call per forward, whatever rows the batch brings.

Every sum has one order, fixed by the position of a token and the index of a number and by nothing else, so
a row's bits do not depend on its batch, on how its prompt was cut, on threads, or on the instruction set.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tandem.engine.batch import Guess, SequenceRows
from tandem.engine.checkpoint import eos_token_ids
from tandem.engine.lean.config import LeanConfig
from tandem.engine.lean.rope import inverse_frequencies
from tandem.engine.lean.shapes import HEAD, tensor_shapes
from tandem.engine.lean.weights import Weights
from tandem.engine.native import build, library
from tandem.engine.native.batch import NativeBatch
from tandem.engine.native.loader import Loader
from tandem.engine.paged_cache import PagedCache
from tandem.engine.storage import Storage

ANGLE_PAGE = 512  # positions whose angles are added at once


class NativeDecoder:
    """A loaded model. Holds no state of a forward, so several caches and threads may share it."""

    implementation = "native"

    def __init__(self, loader: Loader, eos: frozenset[int], isa: str) -> None:
        self.reason = f"kernels for {isa}"
        self.eos_token_ids = eos
        self.linears = loader.choices
        self._loader = loader  # owns what the structs point to
        self._model = loader.model()
        self._vocab = loader.config.geometry.vocab_size
        self._width = -(-self._vocab // library.PANEL) * library.PANEL
        self._isa = isa
        self._inv_freq = inverse_frequencies(loader.config.rope, loader.config.geometry.head_dim).double()
        self._angles = torch.empty(0, 2, loader.config.geometry.head_dim // 2)

    @classmethod
    def load(cls, path: Path, config: LeanConfig, raw: dict[str, Any], stored: Storage) -> NativeDecoder:
        """Open a checkpoint whose config was parsed, where the kernels can run.

        Raises `ConfigError` for weights that do not fit it, or kernels that fail their check.
        """
        isa = build.instruction_set()
        library.load(isa)
        with Weights(path) as weights:
            weights.check(dict(tensor_shapes(config)), frozenset({HEAD}) if config.tied else frozenset())
            eos = eos_token_ids(path, raw, config.architecture.eos_token_id)
            return cls(Loader(config, weights, stored), eos, isa)

    def with_activations_of(self, bits: int) -> NativeDecoder:
        """The same four-bit weights, multiplied with activations of another width: 4, 8, 32, or 0 for what
        is faster here, layer by layer."""
        twin = copy(self)
        twin._model, twin.linears = self._loader.twin(self._isa, bits)
        return twin

    def batch(self, sequences: Sequence[SequenceRows], cache: PagedCache) -> NativeBatch:
        """Index one forward over these rows."""
        return NativeBatch.build(sequences, cache.block_size, cache.num_blocks)

    def forward(self, batch: NativeBatch, cache: PagedCache) -> torch.Tensor:
        """Fill the cache and return `[num_logits_rows, vocab]` float32."""
        angles, logits = self._reach(batch.num_positions), torch.empty(len(batch.logits_rows), self._width)
        rows = self._rows(batch, angles, logits)
        library.engine(self._isa).forward(self._model, _addressed(cache), rows)
        return logits[:, : self._vocab]

    def guess(
        self,
        sequences: Sequence[SequenceRows],
        counts: Sequence[int],
        thresholds: Sequence[float],
        cache: PagedCache,
    ) -> list[Guess]:
        """The most probable tokens after each sequence, one forward per depth, all in one call.

        At most `counts[i]` (1 or more) for sequence i, fewer where the most probable token has a probability
        below `thresholds[i]`. ValueError where its blocks do not hold all of them but the last.
        """
        most, ahead = max(counts), np.array(counts, np.int32) - 1
        batch = NativeBatch.build(sequences, cache.block_size, cache.num_blocks, most - 1)
        ends = batch.positions[batch.first_rows[1:] - 1] + ahead
        if any(end >= len(s.block_table) * cache.block_size for end, s in zip(ends, sequences, strict=True)):
            raise ValueError("the guesses do not fit in their blocks")
        token_ids = np.empty((len(sequences), most), np.int32)
        found, is_unsure = np.empty((2, len(sequences)), np.int32)
        limits = np.array(counts, np.int32), np.array(thresholds, np.float32)
        arrays = (*limits, token_ids, found, is_unsure)
        guesses = library.Guesses(most, *(array.ctypes.data for array in arrays))
        angles, logits = self._reach(batch.num_positions), torch.empty(len(sequences), self._width)
        rows = self._rows(batch, angles, logits)
        library.engine(self._isa).guess(self._model, _addressed(cache), rows, guesses)
        return [
            Guess(row[:count].tolist(), bool(unsure))
            for row, count, unsure in zip(token_ids, found, is_unsure, strict=True)
        ]

    def _rows(self, batch: NativeBatch, angles: torch.Tensor, logits: torch.Tensor) -> library.Batch:
        """The batch by addresses; the caller keeps what they belong to."""
        if batch.token_ids.min() < 0 or batch.token_ids.max() >= self._vocab:
            raise ValueError(f"token ids must be in [0, {self._vocab})")
        arrays = (batch.token_ids, batch.positions, batch.first_rows, batch.tables, batch.first_blocks)
        return library.Batch(
            batch.num_rows,
            len(batch.first_blocks),
            len(batch.logits_rows),
            *(array.ctypes.data for array in arrays),
            batch.logits_rows.ctypes.data,
            angles.data_ptr(),
            logits.data_ptr(),
        )

    def _reach(self, num_positions: int) -> torch.Tensor:
        """Cosines and sines of at least the positions below `num_positions`, `[positions, 2, dim / 2]`."""
        angles = self._angles
        known = len(angles)
        if known < num_positions:
            stop = -(-num_positions // ANGLE_PAGE) * ANGLE_PAGE
            # In double precision, so that every libm rounds to the same floats.
            angle = torch.arange(known, stop).double()[:, None] * self._inv_freq
            more = torch.stack((angle.cos(), angle.sin()), 1).float()
            angles = self._angles = torch.cat((angles, more))
        return angles


def _addressed(cache: PagedCache) -> library.Cache:
    return library.Cache(cache.address, cache.progress_address, cache.num_blocks + 1, cache.block_size)
