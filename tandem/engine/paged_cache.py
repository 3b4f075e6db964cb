"""The tensor that holds keys and values of all layers, addressed by token slots. Knows no sequences.

Slot `s` is offset `s % block_size` of block `s // block_size`. One block more than the pool hands out
stays zero for ever: whoever gathers a ragged batch points its padding there, so stale values in
recycled blocks (even NaN, which masking does not stop) can never reach a result.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from tandem.geometry import ModelGeometry


class PagedCache:
    """Keys and values in `num_blocks` blocks of `block_size` tokens."""

    def __init__(
        self,
        geometry: ModelGeometry,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.geometry = geometry
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.zero_slot = num_blocks * block_size
        shape = (geometry.num_layers, 2, num_blocks + 1, block_size, geometry.num_kv_heads, geometry.head_dim)
        with torch.inference_mode(False):  # threads outside inference mode write to it too
            self._data = torch.zeros(shape, dtype=dtype, device=device)
        flat = self._data.view(geometry.num_layers, 2, -1, geometry.num_kv_heads, geometry.head_dim)
        self._slots = [(layer[0], layer[1]) for layer in flat]  # [slots, kv_heads, head_dim] each
        self._head_rows = [
            (k.view(-1, geometry.head_dim), v.view(-1, geometry.head_dim)) for k, v in self._slots
        ]

    @property
    def dtype(self) -> torch.dtype:
        return self._data.dtype

    @property
    def device(self) -> torch.device:
        return self._data.device

    @property
    def block_bytes(self) -> int:
        """Bytes of one block across all layers."""
        return self._data[:, :, 0].numel() * self._data.element_size()

    def write(
        self,
        layer: int,
        slot_mapping: torch.Tensor,  # [rows] int64
        k: torch.Tensor,  # [rows, kv_heads, head_dim]
        v: torch.Tensor,  # [rows, kv_heads, head_dim]
    ) -> None:
        """Store new keys and values, one slot per row."""
        keys, values = self._slots[layer]
        keys.index_copy_(0, slot_mapping, k)
        values.index_copy_(0, slot_mapping, v)

    def gather(self, layer: int, head_rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of `head_rows` (slot · kv_heads + head), `[len(head_rows), head_dim]` each, copied."""
        keys, values = self._head_rows[layer]
        return keys.index_select(0, head_rows), values.index_select(0, head_rows)

    def tokens(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of whole slots, `[len(slots), kv_heads, head_dim]` each, copied."""
        keys, values = self._slots[layer]
        return keys.index_select(0, slots), values.index_select(0, slots)

    def read_blocks(
        self, block_ids: Sequence[int], layer_start: int = 0, num_layers: int | None = None
    ) -> torch.Tensor:
        """The blocks as they travel: CPU `[num_blocks, num_layers, 2, block_size, kv_heads, head_dim]`."""
        layers = self._layers(layer_start, num_layers)
        chosen = layers.index_select(2, self._ids(block_ids))
        return chosen.permute(2, 0, 1, 3, 4, 5).contiguous().cpu()

    def write_blocks(
        self,
        block_ids: Sequence[int],
        data: bytes | bytearray | memoryview,
        layer_start: int = 0,
        num_layers: int | None = None,
    ) -> None:
        """Fill blocks from the bytes of `read_blocks`. ValueError if the size does not match."""
        layers = self._layers(layer_start, num_layers)
        num_layers, _, _, *token_shape = layers.shape
        shape = (len(block_ids), num_layers, 2, *token_shape)
        incoming = _tensor_over(data, self.dtype, shape)
        layers.index_copy_(2, self._ids(block_ids), incoming.permute(1, 2, 0, 3, 4, 5).to(self.device))

    def check_finite(self, block_ids: Sequence[int], num_tokens: int) -> bool:
        """Whether the first `num_tokens` tokens of these blocks hold only finite numbers, in every layer."""
        chosen = self._data.index_select(2, self._ids(block_ids)).flatten(2, 3)
        return bool(chosen[:, :, :num_tokens].isfinite().all())

    def _layers(self, start: int, count: int | None) -> torch.Tensor:
        stop = self.geometry.num_layers if count is None else start + count
        if not 0 <= start < stop <= self.geometry.num_layers:
            raise ValueError(f"no layers {start}..{stop} in a model of {self.geometry.num_layers}")
        return self._data[start:stop]

    def _ids(self, block_ids: Sequence[int]) -> torch.Tensor:
        if block_ids and not 0 <= min(block_ids) <= max(block_ids) < self.num_blocks:
            raise ValueError(f"block ids must be in [0, {self.num_blocks})")
        return torch.tensor(block_ids, dtype=torch.int64, device=self.device)


def _tensor_over(
    data: bytes | bytearray | memoryview, dtype: torch.dtype, shape: tuple[int, ...]
) -> torch.Tensor:
    """A tensor over the buffer's own memory. It must only be read: the buffer may be immutable."""
    view = memoryview(data).cast("B")
    expected = dtype.itemsize * torch.Size(shape).numel()
    if view.nbytes != expected:
        raise ValueError(f"{view.nbytes} bytes do not fill {expected}")
    if not expected:
        return torch.empty(shape, dtype=dtype)
    if view.readonly:
        # torch.frombuffer warns about immutable memory even if nobody writes; ctypes lends it the same bytes.
        address = np.frombuffer(view, dtype=np.uint8).ctypes.data
        return torch.frombuffer((ctypes.c_char * expected).from_address(address), dtype=dtype).view(shape)
    return torch.frombuffer(view, dtype=dtype).view(shape)
