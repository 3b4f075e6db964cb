"""From a checkpoint's tensors to what the kernels read: packed weights, and structs that point to them."""

from __future__ import annotations

import ctypes

import torch

from tandem.engine.lean.config import LeanConfig
from tandem.engine.lean.shapes import EMBEDDING, tensor_shapes
from tandem.engine.lean.weights import Weights
from tandem.engine.linear import LinearChoice, fits
from tandem.engine.native import packing, structs
from tandem.engine.native.arena import Arena
from tandem.engine.native.probe import WidthProbe
from tandem.engine.quantization.formats import quantize
from tandem.engine.storage import Storage

QK_NORM = {"": 0, "head": 1, "all": 2}
LINEARS = {  # fields of a layer's struct, and what the report calls them
    "qkv": "self_attn.qkv_proj",
    "output": "self_attn.o_proj",
    "gate_up": "mlp.gate_up_proj",
    "down": "mlp.down_proj",
}

STORED = {  # kernels of weights that are not quantized, and why they are kept so
    torch.float16: ("native-fp16", "exact in half precision"),
    torch.bfloat16: ("native-bf16-weights", "exact in bfloat16"),
    torch.float32: ("native-fp32", "weights need single precision"),
}


class Loader:
    """Turns named tensors into structs, and keeps what they point to."""

    def __init__(self, config: LeanConfig, weights: Weights, stored: Storage) -> None:
        self.config = config
        self.choices: dict[str, LinearChoice] = {}
        self._weights = weights
        self._storage = stored
        self._arena = Arena()
        self._kept: list[torch.Tensor | packing.PackedLinear] = []
        self._names = {name for name, _ in tensor_shapes(config)}
        layers = [self._layer(index) for index in range(config.geometry.num_layers)]
        self._layers = (structs.Layer * len(layers))(*layers)
        self._embedding = self._arena.keep(self._stored(weights.get(EMBEDDING)))
        self._norm = self._vector("model.norm")
        tied = [EMBEDDING.removesuffix(".weight")] if config.tied else None
        self._head = self._linear("lm_head", tied)

    def twin(self, isa: str, bits: int) -> tuple[structs.Model, dict[str, LinearChoice]]:
        """The same weights, those of four bits with activations of `bits`; 0: what is faster here."""
        layers, choices = type(self._layers)(*self._layers), dict(self.choices)
        probe = WidthProbe(isa)
        for index, layer in enumerate(layers):
            for field, name in LINEARS.items():
                linear, full_name = getattr(layer, field), f"model.layers.{index}.{name}"
                if linear.format == packing.CODE4:
                    linear.activation_bits, reason = (bits, "asked for") if bits else probe.faster(linear)
                    kernel = _kernel(self._storage.quantization, linear.activation_bits)
                    choices[full_name] = LinearChoice(kernel, reason)
        return self.model(layers), choices

    def model(self, layers: ctypes.Array[structs.Layer] | None = None) -> structs.Model:
        """The struct of the whole model, over these layers or its own."""
        geometry, config = self.config.geometry, self.config
        return structs.Model(
            num_layers=geometry.num_layers,
            hidden=geometry.hidden_size,
            heads=geometry.num_heads,
            kv_heads=geometry.num_kv_heads,
            dim=geometry.head_dim,
            ffn=config.intermediate_size,
            vocab=geometry.vocab_size,
            plain_norm=config.architecture.plain_norm,
            qk_norm=QK_NORM[config.architecture.qk_norm],
            embedding_number=structs.NUMBERS[self._embedding.dtype],
            eps=config.norm_eps,
            clip_qkv=config.clip_qkv or 0.0,
            embedding=self._embedding.data_ptr(),
            norm=self._norm,
            head=self._head,
            layers=layers or self._layers,
        )

    def _layer(self, index: int) -> structs.Layer:
        at, known = f"model.layers.{index}", self.config.architecture
        attention, mlp = f"{at}.self_attn", f"{at}.mlp"
        before, after = not known.norm_after, known.norm_after
        return structs.Layer(
            qkv=self._linear(f"{at}.{LINEARS['qkv']}", [f"{attention}.{x}_proj" for x in "qkv"]),
            output=self._linear(f"{at}.{LINEARS['output']}"),
            gate_up=self._linear(f"{at}.{LINEARS['gate_up']}", [f"{mlp}.gate_proj", f"{mlp}.up_proj"]),
            down=self._linear(f"{at}.{LINEARS['down']}"),
            input_norm=self._vector(f"{at}.input_layernorm") if before else None,
            query_norm=self._vector(f"{attention}.q_norm") if known.qk_norm else None,
            key_norm=self._vector(f"{attention}.k_norm") if known.qk_norm else None,
            attended_norm=self._vector(f"{at}.post_attention_layernorm") if after else None,
            ffn_norm=self._vector(f"{at}.post_attention_layernorm") if before else None,
            ffn_out_norm=self._vector(f"{at}.post_feedforward_layernorm") if after else None,
            window=self.config.windows[index] or 0,
        )

    def _vector(self, name: str) -> int | None:
        """The address of a norm's weights, if it has any."""
        if self.config.architecture.plain_norm:
            return None
        weight = self._weights.get(f"{name}.weight").clone()
        self._kept.append(weight)
        return weight.data_ptr()

    def _linear(self, name: str, parts: list[str] | None = None) -> structs.Linear:
        """The weights of `parts` on top of each other; `name` is what the report says."""
        parts = parts or [name]
        biased = f"{parts[0]}.bias" in self._names
        bias = torch.cat([self._weights.get(f"{part}.bias") for part in parts]) if biased else None
        weight = torch.cat([self._weights.get(f"{part}.weight") for part in parts])
        packed, self.choices[name] = self._pack(name, weight, bias)
        self._kept.append(packed)
        return packed.struct

    def _pack(
        self, name: str, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[packing.PackedLinear, LinearChoice]:
        storage = self._storage
        if storage.quantization == "bf16" and name != "lm_head":
            return packing.pack_bf16(weight, bias, self._arena), LinearChoice("native-bf16", "asked for")
        if storage.quantization != "none" and name != "lm_head":
            quantized = quantize(weight, storage.quantization, storage.is_given)
            if quantized is not None:
                packed = packing.pack_quantized(quantized, storage.activation_bits, bias, self._arena)
                kernel = _kernel(storage.quantization, storage.activation_bits)
                return packed, LinearChoice(kernel, f"groups of {quantized.group}")
        plain = self._stored(weight)
        kernel, reason = STORED[plain.dtype]
        if storage.linear != "auto":
            reason = "asked for"
        if storage.quantization != "none" and name != "lm_head":
            reason = f"{weight.shape[1]} inputs cannot be grouped"
        return packing.pack_linear(plain, bias, self._arena), LinearChoice(kernel, reason)

    def _stored(self, weight: torch.Tensor) -> torch.Tensor:
        wanted = self._storage.linear
        if wanted == "fp16" or (wanted == "auto" and fits(weight, torch.float16)):
            return weight.half()
        return weight.bfloat16() if wanted == "auto" and fits(weight, torch.bfloat16) else weight


def _kernel(quantization: str, activation_bits: int) -> str:
    emulated = "-emulated" if activation_bits == 4 else ""
    return f"native-{quantization}-a{activation_bits}{emulated}"
