"""Runs a decoder-only model over ragged batches: weights, kernels and paged cache in one place.

Knows no requests, queues or block owners: a caller brings rows and block tables, and gets logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from tandem.engine.batch import ForwardBatch, SequenceRows
from tandem.engine.checkpoint import eos_token_ids, load_model
from tandem.engine.linear import LinearChoice, RowTable, TiledLinear, swap_linears
from tandem.engine.paged_cache import PagedCache
from tandem.geometry import ModelGeometry

WARM_UP_TOKENS = 96


class ModelRunner:
    """A loaded model and its cache. One thread calls `forward`; others may read and write settled blocks."""

    def __init__(
        self,
        model: PreTrainedModel,
        geometry: ModelGeometry,
        cache: PagedCache,
        linears: dict[str, LinearChoice],
    ) -> None:
        self.geometry = geometry
        self.cache = cache
        self.eos_token_ids = eos_token_ids(model)
        self._model = model
        self._linears = linears
        self._table = _common_table(model)

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        dtype: str = "float32",
        linear: str = "auto",
        num_blocks: int,
        block_size: int,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Open a local checkpoint. Raises `ConfigError` for what cannot be served."""
        torch_dtype: torch.dtype = getattr(torch, dtype)
        geometry = ModelGeometry.from_path(path)
        with torch.inference_mode():
            model = load_model(path, torch_dtype, device)
            linears = swap_linears(model, linear)
            cache = PagedCache(geometry, num_blocks, block_size, torch_dtype, device)
        return cls(model, geometry, cache, linears)

    @property
    def vocab_size(self) -> int:
        return self.geometry.vocab_size

    @property
    def device(self) -> torch.device:
        return self.cache.device

    def linear_report(self) -> dict[str, LinearChoice]:
        """The kernel of each linear layer and why, by module name."""
        return dict(self._linears)

    def batch(self, sequences: Sequence[SequenceRows]) -> ForwardBatch:
        """Index one forward over these rows."""
        return ForwardBatch.build(sequences, self.cache)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """Fill the cache with the batch's rows; `[num_logits_rows, vocab]` float32 of the rows asked for."""
        if batch.new_blocks is not None:
            self.cache.clear(batch.new_blocks)
        padding = self._table.padded(batch.num_rows) - batch.num_rows if self._table else 0
        token_ids, positions = batch.token_ids, batch.positions
        if padding:
            token_ids, positions = F.pad(token_ids, (0, padding)), F.pad(positions, (0, padding))
        output = self._model(
            input_ids=token_ids,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=batch.logits_indices,
            forward_batch=batch,
            cache=self.cache,
        )
        return output.logits[0].float()  # type: ignore[no-any-return]

    def warm_up(self) -> None:
        """Run each kind of row once, in blocks whose content no one relies on yet."""
        tokens = min(
            WARM_UP_TOKENS, self.cache.num_blocks * self.cache.block_size - 1, self.geometry.max_context - 1
        )
        table = range(-(-(tokens + 1) // self.cache.block_size))
        for start, rows in ((0, tokens // 2), (tokens // 2, tokens - tokens // 2), (tokens, 1)):
            if rows:
                self.forward(self.batch([SequenceRows([0] * rows, start, table)]))


def _common_table(model: torch.nn.Module) -> RowTable | None:
    """Row counts that are stable on every layer at once, so that no layer has to pad by itself."""
    stable = [set(m.choice.rows) for m in model.modules() if isinstance(m, TiledLinear)]
    return RowTable(tuple(sorted(set.intersection(*stable)))) if stable else None
