"""How linear weights are kept in memory, and how wide the activations are that they meet."""

from __future__ import annotations

from dataclasses import dataclass

ACTIVATION_BITS = 16  # that quantized weights meet in our own kernels; other paths compute with float32


@dataclass(frozen=True, slots=True)
class Storage:
    """`linear`: auto | fp32 | fp16, for what is not quantized. `quantization`: see `quantization.formats`."""

    linear: str = "auto"
    quantization: str = "none"
    activation_bits: int = ACTIVATION_BITS  # 8, 4: for drafts, by our own kernels only
    is_given: bool = False  # the checkpoint is quantized: only what keeps its numbers may be done to them
