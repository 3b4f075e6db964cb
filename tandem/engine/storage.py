"""How linear weights are kept in memory, and how wide the activations are that they meet."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.quantizations import ACTIVATION_BITS


@dataclass(frozen=True, slots=True)
class Storage:
    """`linear`: auto | fp32 | fp16, for what is not quantized. `quantization`: see `quantization.formats`."""

    linear: str = "auto"
    quantization: str = "none"
    activation_bits: int = ACTIVATION_BITS  # 8, and for drafts 4: by our own kernels only
    is_draft: bool = False  # of a target's weights, which may be quantized already, in a format of its own
    is_given: bool = False  # the checkpoint is quantized: only what keeps its numbers may be done to them
