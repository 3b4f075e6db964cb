"""How linear weights may be quantized, by name: a format and, with `-a8` behind, activations of eight bits.

Formats are in tandem/engine/quantization/formats.py. Activations have sixteen bits otherwise, which loses
next to nothing; eight multiply faster where there are many rows, as in prompts. In `bf16` weights and
activations are rounded to bfloat16, which processors with AVX-512 BF16 multiply twice as fast as floats.
"""

from __future__ import annotations

from tandem.errors import ConfigError

FOUR_BITS = (
    *("nf4", "nf4-dq", "fp4", "fp4-dq"),
    *("int4", "int4-rotated", "int4-outliers", "int4-rotated-outliers"),
)
CODED = ("int8", *FOUR_BITS)  # codes with scales
QUANTIZATIONS = ("none", "bf16", *CODED)
AUTO = "auto"  # of a draft: what makes it fastest,
AUTO_DRAFT = "int8-a8"  # a model of its own where own kernels run it,
AUTO_SELF_DRAFT = "nf4"  # and the target's own weights
ACTIVATION_BITS = 16  # that quantized weights meet in our own kernels; other paths compute with float32
EIGHT_BITS = "-a8"  # behind a format


def parse_quantization(name: str) -> tuple[str, int]:
    """The format of the weights, and the bits of activations. Raises `ConfigError` if there is none such."""
    weights = name.removesuffix(EIGHT_BITS)
    if weights not in QUANTIZATIONS or (weights not in CODED and name != weights):
        known = ", ".join(QUANTIZATIONS)
        raise ConfigError(
            f"quantization must be one of {known}, or one from {CODED[0]} on with {EIGHT_BITS} behind it; "
            f"not {name}"
        )
    return weights, ACTIVATION_BITS if name == weights else 8


def natural_kv_dtype(weights: str, activation_bits: int, dtype: str) -> str:
    """In which numbers a model that computes in `dtype` holds its KV where nobody says: in bfloat16 if its
    activations are rounded to that or to less."""
    return "bfloat16" if weights == "bf16" or activation_bits < ACTIVATION_BITS else dtype
