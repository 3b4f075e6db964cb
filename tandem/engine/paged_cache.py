"""The tensor that holds keys and values of all layers, addressed by token slots. Knows no sequences.

Slot `s` is offset `s % block_size` of block `s // block_size`. A block of one head is contiguous, so
attention gathers whole blocks. Masking does not stop a stale NaN (0 · NaN), so nothing stale may be
gathered at all: one block more than the pool hands out stays zero for ever and stands in for blocks a
row does not have, and a block is cleared when a sequence starts it without filling it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from tandem.engine.native import structs
from tandem.engine.native.kernels import kernels_for
from tandem.engine.native.transfer import BlockMover
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
        self.zero_block = num_blocks
        shape = (geometry.num_layers, 2, geometry.num_kv_heads, num_blocks + 1, block_size, geometry.head_dim)
        with torch.inference_mode(False):  # threads outside inference mode write to it too
            self._data = torch.zeros(shape, dtype=dtype, device=device)
        # Views per layer: [2 · kv_heads, slots, head_dim], [2 · kv_heads · blocks, block_size · head_dim].
        self._slots = [layer.flatten(0, 1).flatten(1, 2) for layer in self._data]
        self._head_blocks = [layer.flatten(0, 2).flatten(1) for layer in self._data]
        first = torch.arange(2 * geometry.num_kv_heads, device=device) * (num_blocks + 1)
        self._first_block_of_head = first.view(2, 1, -1, 1)  # [kv, rows, kv_heads, blocks] int64
        self._scratch = self._data.new_empty(0)
        self._layers_written = np.zeros(1, np.int32)
        self.for_kernels = structs.Cache(
            *(self._data.data_ptr(), self._layers_written.ctypes.data),
            *(num_blocks + 1, block_size, structs.NUMBERS[dtype]),
        )
        isa = kernels_for(self.device.type)
        self._mover = None if isa is None else BlockMover(isa, self._data)

    @property
    def dtype(self) -> torch.dtype:
        return self._data.dtype

    @property
    def device(self) -> torch.device:
        return self._data.device

    @property
    def block_bytes(self) -> int:
        """Bytes of one block across all layers."""
        return self._data[:, :, :, 0].numel() * self._data.element_size()

    @property
    def layers_written(self) -> int:
        """Layers whose keys and values the forward that runs now has stored, for all of its rows. Whoever
        wants to know sets it to 0 before that forward. Any thread may look."""
        return int(self._layers_written[0])

    @layers_written.setter
    def layers_written(self, count: int) -> None:
        self._layers_written[0] = count

    def write(self, layer: int, slot_mapping: torch.Tensor, kv: torch.Tensor) -> None:
        """Store new keys and values, one slot per row.

        `slot_mapping` is [rows] int64; `kv` [rows, 2 · kv_heads, head_dim] has the keys' heads first. It is
        rounded to the cache's dtype; what that cannot hold is stored as infinite.
        """
        self._slots[layer].index_copy_(1, slot_mapping, kv.transpose(0, 1).to(self.dtype))
        self.layers_written = layer + 1

    def clear(self, block_ids: torch.Tensor) -> None:
        """Zero blocks `[n]` in all layers."""
        self._data.index_fill_(3, block_ids, 0)

    def head_block_index(self, blocks: torch.Tensor) -> torch.Tensor:
        """What `gather` takes to bring block tables `[rows, n]`: `[2 · rows · kv_heads · n]`."""
        return (blocks[:, None] + self._first_block_of_head).flatten()

    def gather(self, layer: int, index: torch.Tensor, matrices: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of whole blocks, `[matrices, tokens, head_dim]` each, valid until the next call."""
        size = index.shape[0] * self.block_size * self.geometry.head_dim
        if self._scratch.numel() < size:  # fresh memory per call costs more than the copy
            self._scratch = self._data.new_empty(size)
        out = self._scratch[:size].view(index.shape[0], -1)
        torch.index_select(self._head_blocks[layer], 0, index, out=out)
        keys, values = out.view(2, matrices, -1, self.geometry.head_dim).unbind()
        return keys, values

    def read_blocks(
        self, block_ids: Sequence[int], layer_start: int = 0, num_layers: int | None = None
    ) -> torch.Tensor:
        """The blocks as they travel: CPU `[num_blocks, num_layers, 2, block_size, kv_heads, head_dim]`."""
        layers = self._layers(layer_start, num_layers)
        chosen = layers.index_select(3, self._ids(block_ids))
        return chosen.permute(3, 0, 1, 4, 2, 5).contiguous().cpu()

    def export_blocks(
        self, block_ids: Sequence[int], num_used: int, layer_start: int = 0, num_layers: int | None = None
    ) -> tuple[memoryview, bool] | None:
        """The bytes of `read_blocks` with zeros for the last block's slots from `num_used` on, and whether
        all of that is finite; None where there are no kernels for it. ValueError as from `read_blocks`, or if
        a block has fewer slots."""
        layers = self._range(layer_start, num_layers)
        self._check(block_ids)
        if not 0 <= num_used <= self.block_size:
            raise ValueError(f"a block has {self.block_size} slots, not {num_used}")
        return self._mover.export(block_ids, layers, num_used) if self._mover is not None else None

    def write_blocks(
        self,
        block_ids: Sequence[int],
        data: bytes | bytearray | memoryview,
        layer_start: int = 0,
        num_layers: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Fill blocks from the bytes of `read_blocks`, of a cache of `dtype` if that is another one.
        ValueError if the size does not match.

        Slots after the last token must hold finite numbers; the sender zeroes them.
        """
        if self._mover is not None and dtype in (None, self.dtype):
            self._check(block_ids)
            self._mover.place(block_ids, self._range(layer_start, num_layers), data)
            return
        layers = self._layers(layer_start, num_layers)
        num_layers, _, kv_heads, _, block_size, head_dim = layers.shape
        incoming = tensor_over(
            data, dtype or self.dtype, (len(block_ids), num_layers, 2, block_size, kv_heads, head_dim)
        )
        layers.index_copy_(3, self._ids(block_ids), incoming.permute(1, 2, 4, 0, 3, 5).to(self._data))

    def check_finite(self, block_ids: Sequence[int], num_tokens: int) -> bool:
        """Whether the first `num_tokens` tokens of these blocks hold only finite numbers, in every layer."""
        chosen = self._data.index_select(3, self._ids(block_ids)).flatten(3, 4)
        return all_finite(chosen[:, :, :, :num_tokens])

    def _layers(self, start: int, count: int | None) -> torch.Tensor:
        chosen = self._range(start, count)
        return self._data[chosen.start : chosen.stop]

    def _range(self, start: int, count: int | None) -> range:
        stop = self.geometry.num_layers if count is None else start + count
        if not 0 <= start < stop <= self.geometry.num_layers:
            raise ValueError(f"no layers {start}..{stop} in a model of {self.geometry.num_layers}")
        return range(start, stop)

    def _check(self, block_ids: Sequence[int]) -> None:
        if block_ids and not 0 <= min(block_ids) <= max(block_ids) < self.num_blocks:
            raise ValueError(f"block ids must be in [0, {self.num_blocks})")

    def _ids(self, block_ids: Sequence[int]) -> torch.Tensor:
        self._check(block_ids)
        return torch.tensor(block_ids, dtype=torch.int64, device=self.device)


def all_finite(values: torch.Tensor) -> bool:
    """Whether a tensor, not an empty one, holds neither NaN nor infinities: both show in its least and
    greatest. A tenth of what `isfinite().all()` takes, which makes a tensor of answers first."""
    least, greatest = values.aminmax()
    return bool(least.isfinite() & greatest.isfinite())


def tensor_over(
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
