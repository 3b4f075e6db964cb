"""Which width of activations is faster for a layer's four-bit weights, measured when a draft is loaded.

Only a draft may be what is fastest: its guesses are checked. The target's numbers must be those of every
other worker, whatever machine it runs on, so its kernels follow from its format alone.
"""

from __future__ import annotations

import time

import torch

from tandem.engine.native import library, packing, structs

WIDTHS = (8, 16)  # the first wins a tie
REPEATS = 7


class WidthProbe:
    """Remembers what it found for a shape. Times one row, as a draft runs."""

    def __init__(self, isa: str) -> None:
        self._engine = library.engine(isa)
        self._found: dict[tuple[int, ...], tuple[int, str]] = {}

    def faster(self, linear: structs.Linear) -> tuple[int, str]:
        """Bits of activations, and the reason with both times."""
        shape = (linear.in_features, linear.out_features, linear.is_rotated, linear.num_outliers)
        if shape not in self._found:
            self._found[shape] = self._measure(linear)
        return self._found[shape]

    def _measure(self, linear: structs.Linear) -> tuple[int, str]:
        x = torch.randn(1, linear.in_features, generator=torch.Generator().manual_seed(0))
        variants = {bits: _with_width(linear, bits) for bits in WIDTHS}
        best_s = dict.fromkeys(WIDTHS, float("inf"))
        for _ in range(REPEATS):
            for bits, variant in variants.items():
                began_s = time.perf_counter()
                self._engine.linear(variant, x)
                best_s[bits] = min(best_s[bits], time.perf_counter() - began_s)
        chosen = min(WIDTHS, key=lambda bits: best_s[bits])
        times = " and ".join(f"{1e6 * best_s[bits]:.0f} µs with {bits} bits" for bits in WIDTHS)
        return chosen, f"faster here: {times}"


def _with_width(linear: structs.Linear, bits: int) -> packing.PackedLinear:
    """A copy of the struct; its tensors are kept by the model."""
    copy = structs.Linear.from_buffer_copy(linear)
    copy.activation_bits = bits
    return packing.PackedLinear(copy, (), linear.out_features)
