"""Weights in four or eight bits: the formats of bitsandbytes, and plain integers in groups.

    int8      one scale per output row, absmax / 127 (LLM.int8, Dettmers et al. 2022)
    nf4, fp4  16 levels times the absmax of each group of 64 (QLoRA, Dettmers et al. 2023)
    nf4-dq,   the same, their absmax in eight bits: dynamic map, groups of 256, offset by the mean
    fp4-dq
    int4      -7 … 7 times one scale per group of 128
    int4-rotated
              the same of the weights times a Hadamard matrix, group by group (QuaRot, Ashkboos et al. 2024);
              activations are turned likewise when they come, which spreads what sticks out of them
    int4-outliers
              one input in 32, those with the largest weights, kept apart in int8 (Atom, Zhao et al. 2024, who
              choose them by the activations of a calibration set, which a loader does not have)
    int4-rotated-outliers
              both: outliers are taken out first

Groups run along the inputs of one output. bitsandbytes lets them run on into the next row; both are the same
where the group divides the inputs, and where it does not, the group here is the largest half that does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from tandem.errors import ConfigError
from tandem.quantizations import CODED

# Quantiles of the normal distribution, and 4-bit floats: the numbers bitsandbytes stores in its checkpoints.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = (0.0, 0.0052083334885537624, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25)
FP4 = _FP4 + tuple(-value for value in _FP4)
INT4 = tuple(float(value) for value in range(-8, 8))

CODEBOOKS = {"nf4": NF4, "fp4": FP4, "int4": INT4}
GROUPS = {"nf4": 64, "fp4": 64, "int4": 128}
MIN_GROUP = 32
INT4_MOST = 7
INT8_MOST = 127
OUTLIER_SHARE = 32  # one input in so many
NESTED_GROUP = 256  # scales that share a scale of their own


@dataclass(frozen=True, slots=True)
class Outliers:
    """Inputs that are kept apart."""

    inputs: torch.Tensor  # [n] int64, ascending
    weight: QuantizedWeight  # [out, n] in int8


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight matrix `[out, in]` as codes and scales."""

    kind: str  # a base format: int8, nf4, fp4, int4
    codes: torch.Tensor  # [out, in]: int8, or uint8 codes below 16
    scales: torch.Tensor  # [out, groups] float32
    is_rotated: bool = False  # codes are of the weights times a Hadamard matrix
    outliers: Outliers | None = None  # those inputs count as zeros in the codes

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    @property
    def levels(self) -> torch.Tensor:
        """The codebook, `[16]` float32, of a four-bit format."""
        return torch.tensor(CODEBOOKS[self.kind])

    def dequantize(self) -> torch.Tensor:
        """`[out, in]` float32."""
        values = self.codes.float() if self.kind == "int8" else self.levels[self.codes.long()]
        grouped = values.view(len(values), self.scales.shape[1], -1) * self.scales[..., None]
        weight = (hadamard(grouped) if self.is_rotated else grouped).reshape(values.shape)
        if self.outliers is not None:
            weight[:, self.outliers.inputs] = self.outliers.weight.dequantize()
        return weight


def hadamard(values: torch.Tensor) -> torch.Tensor:
    """`values` [..., n] times the orthonormal Hadamard matrix of size n, a power of two; its own inverse."""
    size, width = values.shape[-1], 1
    while width < size:
        pairs = values.reshape(-1, size // (2 * width), 2, width)
        first, second = pairs.unbind(2)
        values = torch.stack((first + second, first - second), 2).view(values.shape)
        width *= 2
    return values / math.sqrt(size)


def group_for(kind: str, in_features: int) -> int | None:
    """Inputs per scale; None if no group of at least 32 divides the inputs."""
    group = GROUPS[kind]
    while group >= MIN_GROUP:
        if in_features % group == 0:
            return group
        group //= 2
    return None


def quantize(weight: torch.Tensor, quantization: str, is_given: bool = False) -> QuantizedWeight | None:
    """`weight` [out, in] in the named format; None if its inputs cannot be grouped.

    Numbers that are `is_given` as dequantized ones come back only if their groups end with the row.
    """
    if quantization not in CODED:
        raise ConfigError(f"unknown quantization {quantization}; known: {', '.join(CODED)}")
    kind, *options = quantization.split("-")
    if kind == "int8":
        return _eight_bits(weight)
    group = group_for(kind, weight.shape[1])
    if group is None or (is_given and group != GROUPS[kind]):
        return None
    outliers = None
    if "outliers" in options:
        weight, outliers = _apart(weight)
    blocks = weight.float().view(weight.shape[0], -1, group)
    if "rotated" in options:
        blocks = hadamard(blocks)
    scales = blocks.abs().amax(-1)
    if kind == "int4":
        scales = scales / INT4_MOST
    normal = blocks / torch.where(scales > 0, scales, 1.0)[..., None]
    codes = _nearest(normal, torch.tensor(CODEBOOKS[kind])).view(weight.shape)
    if "dq" in options:
        scales = requantized(scales)
    return QuantizedWeight(kind, codes, scales, "rotated" in options, outliers)


def _eight_bits(weight: torch.Tensor) -> QuantizedWeight:
    scales = weight.abs().amax(1, keepdim=True).float() / INT8_MOST
    codes = torch.round(weight / torch.where(scales > 0, scales, 1.0)).to(torch.int8)
    return QuantizedWeight("int8", codes, scales)


def _apart(weight: torch.Tensor) -> tuple[torch.Tensor, Outliers]:
    """The weights without the inputs that have the largest sum of squares, and these."""
    count = -(-weight.shape[1] // OUTLIER_SHARE)
    inputs = weight.square().sum(0).topk(count).indices.sort().values
    rest = weight.clone()
    rest[:, inputs] = 0
    return rest, Outliers(inputs, _eight_bits(weight[:, inputs]))


def _nearest(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The code of the level next to each value, uint8."""
    ascending, order = levels.sort(stable=True)
    place = torch.bucketize(values.contiguous(), (ascending[1:] + ascending[:-1]) / 2)
    return order.to(torch.uint8)[place]


def requantized(scales: torch.Tensor) -> torch.Tensor:
    """Scales after a trip through eight bits, as double quantization stores them."""
    flat = scales.flatten()
    offset = flat.mean()
    padded = F.pad(flat - offset, (0, -flat.numel() % NESTED_GROUP)).view(-1, NESTED_GROUP)
    most = padded.abs().amax(1, keepdim=True)
    codes = _nearest(padded / torch.where(most > 0, most, 1.0), dynamic_map())
    return nested_scales(codes.flatten()[: flat.numel()], dynamic_map(), most.flatten(), offset).view(
        scales.shape
    )


def nested_scales(
    codes: torch.Tensor, levels: torch.Tensor, scales: torch.Tensor, offset: torch.Tensor | float
) -> torch.Tensor:
    """The scales that eight-bit `codes` [n] stand for; `levels` [256], `scales` [n / 256]."""
    values = levels[codes.long()]
    return values * scales.repeat_interleave(NESTED_GROUP)[: values.numel()] + offset


@cache
def dynamic_map() -> torch.Tensor:
    """The 256 levels of dynamic eight-bit quantization (Dettmers 2016): sign, decade, linear fraction."""
    levels = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        levels += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(levels))
