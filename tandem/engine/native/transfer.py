"""Blocks of a cache as they travel, `[blocks, layers, 2, block_size, kv_heads, dim]`, by own kernels.

Torch makes three or four passes over the same bytes (take, permute, look for what is not finite).
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence

import numpy as np
import torch

from tandem.engine.native import library
from tandem.engine.native.structs import Blocks

EXPONENTS = {torch.float32: 0x7F800000, torch.float16: 0x7C00, torch.bfloat16: 0x7F80}


class BlockMover:
    """Moves blocks of one cache's tensor, `[layers, 2, kv_heads, blocks, block_size, dim]`, which outlives
    this. Arguments must be in range; other threads run meanwhile."""

    def __init__(self, isa: str, data: torch.Tensor) -> None:
        _, _, kv_heads, num_blocks, block_size, dim = data.shape
        self._library = library.load(isa)
        self._vector_bytes = dim * data.element_size()
        self._block_bytes = 2 * kv_heads * block_size * self._vector_bytes  # of one layer
        self._shape = (data.data_ptr(), num_blocks, block_size, kv_heads, self._vector_bytes)
        self._number = (EXPONENTS[data.dtype], data.element_size() == 2)

    def export(self, block_ids: Sequence[int], layers: range, num_used: int) -> tuple[memoryview, bool]:
        """Their bytes, with zeros for the last block's slots from `num_used` on; whether all is finite."""
        out = np.empty(len(block_ids) * len(layers) * self._block_bytes, np.uint8)
        named = self._named(block_ids, layers)
        is_finite = self._library.tandem_export_blocks(*named, num_used, _address(out))
        return out.data, bool(is_finite)

    def place(self, block_ids: Sequence[int], layers: range, data: bytes | bytearray | memoryview) -> None:
        """Fill blocks. ValueError if the size does not match."""
        found = np.frombuffer(data, np.uint8)
        expected = len(block_ids) * len(layers) * self._block_bytes
        if found.nbytes != expected:
            raise ValueError(f"{found.nbytes} bytes do not fill {expected}")
        self._library.tandem_import_blocks(*self._named(block_ids, layers), _address(found))

    def _named(self, block_ids: Sequence[int], layers: range) -> tuple[object, ...]:
        blocks = Blocks(*self._shape, layers.start, len(layers), *self._number)
        ids = array("q", block_ids)
        return ctypes.byref(blocks), (ctypes.c_int64 * len(ids)).from_buffer(ids), len(ids)


def _address(data: np.ndarray) -> int:
    address: int = data.__array_interface__["data"][0]
    return address
