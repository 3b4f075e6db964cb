"""Quantized weights of a model made of torch modules: rounded in place on a CPU, by bitsandbytes on a GPU.

On a CPU bitsandbytes' product of a row depends on the rows beside it, so there the weights become the numbers
that their codes stand for, and the stable kernels of `tandem.engine.linear` multiply them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tandem.engine.linear import LinearChoice
from tandem.engine.quantization.formats import quantize
from tandem.errors import ConfigError

HEAD = "lm_head"


def round_weights(model: torch.nn.Module, quantization: str) -> None:
    """Every linear weight but the head's becomes the nearest that the format can hold."""
    for _, linear in _linears(model):
        quantized = quantize(linear.weight.detach().float(), quantization)
        if quantized is not None:
            linear.weight.data.copy_(quantized.dequantize())


def swap_for_bitsandbytes(model: torch.nn.Module, quantization: str) -> dict[str, LinearChoice]:
    """Replace every linear layer but the head by bitsandbytes' module; what was chosen, by module name.

    Weights are quantized when the modules move to a device: move the model afterwards, even to a CPU. Raises
    `ConfigError` for formats that bitsandbytes has not, or without it.
    """
    if quantization.startswith("int4"):
        raise ConfigError(f"{quantization} runs on a CPU only; on a GPU take int8, nf4 or fp4")
    try:
        from bitsandbytes import nn as modules
    except ImportError as error:
        raise ConfigError("quantization on a GPU needs bitsandbytes: pip install bitsandbytes") from error
    report = {}
    for name, linear in list(_linears(model)):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _module(modules, linear, quantization))
        report[name] = LinearChoice(f"bitsandbytes-{quantization}", "rows may depend on the batch")
    return report


def _module(modules: Any, linear: torch.nn.Linear, quantization: str) -> torch.nn.Module:
    """The same layer; its weights are still whole."""
    kind, _, nested = quantization.partition("-")
    shape, has_bias, weight = (
        (linear.in_features, linear.out_features),
        linear.bias is not None,
        linear.weight,
    )
    module: torch.nn.Module
    if kind == "int8":
        module = modules.Linear8bitLt(*shape, bias=has_bias, has_fp16_weights=False)
        module.weight = modules.Int8Params(weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        options = {"quant_type": kind, "compress_statistics": bool(nested)}
        module = modules.Linear4bit(*shape, bias=has_bias, compute_dtype=weight.dtype, **options)
        module.weight = modules.Params4bit(weight.data, requires_grad=False, **options)
    if has_bias:
        module.bias = linear.bias
    return module


def _linears(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Linear]]:
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear and name.rpartition(".")[2] != HEAD:
            yield name, module
