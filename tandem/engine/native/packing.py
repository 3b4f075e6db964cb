"""Weights as the kernels read them: in panels of outputs, with a struct that points to them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from tandem.engine.native.arena import Arena
from tandem.engine.native.structs import Codebook, Linear
from tandem.engine.quantization.formats import CODEBOOKS, INT8_MOST, QuantizedWeight

PANEL = 16  # outputs that lie together
FORMATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 5}
INT8, CODE4, BF16 = 2, 3, 4
PIECE_INPUTS = 4  # inputs whose codes lie together


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """Weights as the kernels read them. `struct` points into the rest, which lives as long as this."""

    struct: Linear
    tensors: tuple[torch.Tensor, ...]
    out_features: int
    outliers: PackedLinear | None = None

    @property
    def num_bytes(self) -> int:
        mine = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)
        return mine + (self.outliers.num_bytes if self.outliers else 0)


def pack_linear(
    weight: torch.Tensor, bias: torch.Tensor | None = None, arena: Arena | None = None
) -> PackedLinear:
    """`weight` [out, in] float32, float16 or bfloat16, to panels `[out / 16, in, 16]` of the same type."""
    out_features, in_features = weight.shape
    padded = F.pad(weight, (0, 0, 0, -out_features % PANEL))
    panels = (arena or Arena()).keep(padded.view(-1, PANEL, in_features).transpose(1, 2))
    kept = None if bias is None else bias.float().contiguous()
    struct = Linear(
        format=FORMATS[weight.dtype],
        activation_bits=32,
        in_features=in_features,
        out_features=out_features,
        weights=panels.data_ptr(),
        bias=None if kept is None else kept.data_ptr(),
    )
    return PackedLinear(struct, (panels,) if kept is None else (panels, kept), out_features)


def pack_bf16(
    weight: torch.Tensor, bias: torch.Tensor | None = None, arena: Arena | None = None
) -> PackedLinear:
    """`weight` [out, in] float32, to bfloat16 in panels of pairs `[out / 16, in / 2, 16, 2]`. Activations are
    rounded to bfloat16 as they come; what is too small for a normal float counts as zero."""
    out_features, in_features = weight.shape
    normal = torch.where(weight.abs() < torch.finfo(torch.float32).tiny, 0.0, weight).bfloat16()
    padded = F.pad(normal.view(torch.int16), (0, in_features % 2, 0, -out_features % PANEL))
    pairs = padded.view(-1, PANEL, padded.shape[1] // 2, 2).transpose(1, 2)
    tensors = [(arena or Arena()).keep(pairs)]
    struct = Linear(
        format=BF16,
        activation_bits=16,
        in_features=in_features,
        out_features=out_features,
        weights=tensors[0].data_ptr(),
    )
    if bias is not None:
        tensors.append(bias.float().contiguous())
        struct.bias = tensors[-1].data_ptr()
    return PackedLinear(struct, tuple(tensors), out_features)


def pack_quantized(
    weight: QuantizedWeight, activation_bits: int, bias: torch.Tensor | None, arena: Arena
) -> PackedLinear:
    """Codes and scales as the kernels read them. Four-bit codes serve all widths of activations.

    Outliers meet activations as they are, whatever the width of the rest.
    """
    out_features, in_features = weight.codes.shape
    rows = -out_features % PANEL
    scales = F.pad(weight.scales, (0, 0, 0, rows)).view(-1, PANEL, weight.scales.shape[1]).transpose(1, 2)
    codes = F.pad(weight.codes, (0, -in_features % PIECE_INPUTS, 0, rows))
    if weight.kind == "int8" and activation_bits == 32:
        packed = codes[:, :in_features].view(-1, PANEL, in_features).transpose(1, 2)
    else:
        # [panel, lane, nibble, 4 outputs, piece, 4 inputs] → [panel, piece, nibble, lane, output, input]
        split = codes.view(-1, 2, 2, 4, codes.shape[1] // PIECE_INPUTS, PIECE_INPUTS)
        pieces = split.permute(0, 4, 2, 1, 3, 5)
        packed = pieces if weight.kind == "int8" else pieces[:, :, 0] | pieces[:, :, 1] << 4
    tensors = [arena.keep(packed), arena.keep(scales)]
    struct = Linear(
        format=INT8 if weight.kind == "int8" else CODE4,
        activation_bits=activation_bits,
        in_features=in_features,
        out_features=out_features,
        group=weight.group,
        weights=tensors[0].data_ptr(),
        scales=tensors[1].data_ptr(),
        codebook=None if weight.kind == "int8" else ctypes.addressof(_codebook(weight.kind)),
        is_rotated=weight.is_rotated,
    )
    if bias is not None:
        tensors.append(bias.float().contiguous())
        struct.bias = tensors[-1].data_ptr()
    if weight.outliers is None:
        return PackedLinear(struct, tuple(tensors), out_features)
    apart = pack_quantized(weight.outliers.weight, 32, None, arena)
    tensors.append(weight.outliers.inputs.int())
    struct.num_outliers, struct.outlier_inputs = len(tensors[-1]), tensors[-1].data_ptr()
    struct.outliers = ctypes.addressof(apart.struct)
    return PackedLinear(struct, tuple(tensors), out_features, apart)


@cache
def _codebook(kind: str) -> Codebook:
    """What the codes of a format stand for, over a factor, in eight and in sixteen bits."""
    levels = torch.tensor(CODEBOOKS[kind])
    if bool((levels == levels.round()).all()):
        factors = 1.0, 1.0
    else:
        factors = 1 / INT8_MOST, 1 / _finest_grid(levels)
    small, large = (torch.round(levels / factor).int().tolist() for factor in factors)
    return Codebook((ctypes.c_int8 * 16)(*small), (ctypes.c_int16 * 16)(*large), *factors)


def _finest_grid(levels: torch.Tensor) -> int:
    """The number of steps from 0 to 1 on which the levels lie best: 12 bits, which leave activations 13."""
    sizes = torch.arange(2**11, 2**12, dtype=torch.float64)
    scaled = levels.double()[:, None] * sizes
    return int(sizes[((scaled - scaled.round()) / sizes).abs().amax(0).argmin()])
