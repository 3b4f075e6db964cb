"""Grow the bundled pair to the cost of a larger one without changing what it computes.

    python -m bench.inflate --to 111m|1b|8b [--out DIR]

A decode step then reads the bytes and does the arithmetic of the larger model, while target and draft
agree exactly as often as the trained pair does: real acceptance rates at realistic step costs.

    layers      more layers, whose `o_proj` and `down_proj` are zero; their other weights are random, and so
                are the signs of their zeros, lest a runtime store equal matrices once
    FFN         more rows of `gate_proj` and `up_proj`, more columns of `down_proj`, all zero
    heads       more heads, which are zero; where the larger model has fewer query heads per KV head, KV
                heads are repeated
    hidden      zeros; RMSNorm then averages over more numbers, so its weights shrink by sqrt(old / new)
                and its epsilon by old / new (the only weights stored in fp32, as that is not exact in fp16)

The vocabulary cannot grow (a zero row is a token of logit 0), and heads keep their width, so shapes of 64
or 128 per head become two or four heads of 32: the same weights, KV bytes and products.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tandem.config import BUNDLED_MODELS
from tandem.engine.native.build import cache_folder
from tandem.errors import ConfigError
from tandem.fingerprint import checkpoint_digest
from tandem.geometry import ModelGeometry

VERSION = 2  # of what this module writes
SHARD_BYTES = 2 << 30
RANDOM_STD = 0.02
COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True, slots=True)
class Size:
    """What a grown model has; heads are as wide as before."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int


class Pair(NamedTuple):
    """Folders of a target and its draft."""

    target: Path
    draft: Path


BUNDLED = Pair(BUNDLED_MODELS / "target", BUNDLED_MODELS / "draft")
SIZES = {  # a tenth of the target for the draft
    "111m": (Size(30, 576, 18, 6, 1536), Size(8, 320, 10, 5, 896)),
    "1b": (Size(16, 2048, 64, 16, 8192), Size(27, 576, 18, 6, 1536)),  # Llama 3.2 1B
    "8b": (Size(32, 4096, 128, 32, 14336), Size(11, 2048, 64, 16, 8192)),  # Llama 3 8B
}


class Axis(NamedTuple):
    """Where the old indices of one dimension go: `new[i]` holds what was at `old[i]`, the rest is zero."""

    size: int
    new: Tensor
    old: Tensor

    @classmethod
    def padded(cls, old: int, new: int) -> Axis:
        return cls(new, torch.arange(old), torch.arange(old))

    @classmethod
    def of_heads(cls, size: int, pairs: list[tuple[int, int]], width: int) -> Axis:
        """Whole heads, from (new, old) pairs."""
        places = torch.tensor(pairs)[:, :, None] * width + torch.arange(width)
        return cls(size * width, places[:, 0].flatten(), places[:, 1].flatten())


@dataclass(frozen=True, slots=True)
class Axes:
    """All dimensions of a model's matrices."""

    hidden: Axis
    ffn: Axis
    query: Axis
    key: Axis

    def of(self, name: str) -> tuple[Axis, Axis]:
        """Rows and columns of a matrix by the last part of its name."""
        return {
            "q_proj": (self.query, self.hidden),
            "k_proj": (self.key, self.hidden),
            "v_proj": (self.key, self.hidden),
            "o_proj": (self.hidden, self.query),
            "gate_proj": (self.ffn, self.hidden),
            "up_proj": (self.ffn, self.hidden),
            "down_proj": (self.hidden, self.ffn),
        }[name]


def place_heads(old: ModelGeometry, size: Size) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(new, old) pairs of query heads and of KV heads, so that each query finds its own keys.

    Raises `ConfigError` if the larger model has too few KV heads.
    """
    group, new_group = old.num_heads // old.num_kv_heads, size.heads // size.kv_heads
    copies = -(-group // new_group)  # of each KV head
    if old.num_kv_heads * copies > size.kv_heads:
        raise ConfigError(f"{size.kv_heads} KV heads do not hold {copies} copies of {old.num_kv_heads}")
    keys = [(head * copies + copy, head) for head in range(old.num_kv_heads) for copy in range(copies)]
    queries = []
    for head in range(old.num_heads):
        key, inside = divmod(head, group)
        queries.append(((key * copies + inside // new_group) * new_group + inside % new_group, head))
    return queries, keys


def grow(source: Path, size: Size, out: Path) -> None:
    """Write the grown checkpoint to the new folder `out`.

    Raises `ConfigError` if there is such a folder, or `source` is not a smaller Llama in fp16 with tied
    embeddings and no biases.
    """
    config = json.loads((source / "config.json").read_text())
    geometry = ModelGeometry.from_config(config)
    _check(config, geometry, size)
    if out.exists():
        raise ConfigError(f"{out} exists already; name a new folder")
    out.mkdir(parents=True)
    _write_shards(out, _tensors(load_file(source / "model.safetensors"), config, size))
    eps = config["rms_norm_eps"] * geometry.hidden_size / size.hidden
    grown = {**config, **_stated(size), "head_dim": geometry.head_dim, "rms_norm_eps": eps}
    grown["dtype"] = "float32"  # to compute in: the norms' weights need it
    (out / "config.json").write_text(json.dumps(grown, indent=2) + "\n")
    for name in COPIED:
        (out / name).write_bytes((source / name).read_bytes())


def _stated(size: Size) -> dict[str, int]:
    return {
        "num_hidden_layers": size.layers,
        "hidden_size": size.hidden,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "intermediate_size": size.ffn,
    }


def _check(config: dict[str, Any], geometry: ModelGeometry, size: Size) -> None:
    if config.get("architectures") != ["LlamaForCausalLM"] or not config.get("tie_word_embeddings"):
        raise ConfigError("only a Llama with tied embeddings can be grown")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise ConfigError("a model with biases cannot be grown")
    if size.heads % size.kv_heads:
        raise ConfigError(f"{size.heads} heads are no multiple of {size.kv_heads} KV heads")
    smaller = [name for name, value in _stated(size).items() if value < config[name]]
    if smaller:
        raise ConfigError(f"the model is larger already: {', '.join(smaller)}")
    place_heads(geometry, size)


def _tensors(source: dict[str, Tensor], config: dict[str, Any], size: Size) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the grown model, layer by layer."""
    old = ModelGeometry.from_config(config)
    queries, keys = place_heads(old, size)
    hidden = Axis.padded(old.hidden_size, size.hidden)
    axes = Axes(
        hidden=hidden,
        ffn=Axis.padded(config["intermediate_size"], size.ffn),
        query=Axis.of_heads(size.heads, queries, old.head_dim),
        key=Axis.of_heads(size.kv_heads, keys, old.head_dim),
    )
    vocabulary = Axis.padded(old.vocab_size, old.vocab_size)
    yield "model.embed_tokens.weight", _placed(source["model.embed_tokens.weight"], vocabulary, hidden)
    yield "model.norm.weight", _norm(source["model.norm.weight"], size.hidden)
    for name, tensor in source.items():
        if name.startswith("model.layers."):
            part = name.split(".")[-2]
            is_norm = part.endswith("layernorm")
            yield name, _norm(tensor, size.hidden) if is_norm else _placed(tensor, *axes.of(part))
    for layer in range(old.num_layers, size.layers):
        yield from _idle_layer(f"model.layers.{layer}", axes, torch.Generator().manual_seed(layer))


def _placed(weight: Tensor, rows: Axis, columns: Axis) -> Tensor:
    if weight.dtype != torch.float16:
        raise ConfigError(f"weights must be float16, not {weight.dtype}")
    out = torch.zeros(rows.size, columns.size, dtype=torch.float16)
    out[rows.new[:, None], columns.new] = weight[rows.old[:, None], columns.old]
    return out


def _norm(weight: Tensor, hidden: int) -> Tensor:
    out = torch.zeros(hidden)
    out[: len(weight)] = (weight.double() * math.sqrt(len(weight) / hidden)).float()
    return out


def _idle_layer(at: str, axes: Axes, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """A layer that does all the work and adds nothing."""
    for block, names in (
        ("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("mlp", ("gate_proj", "up_proj", "down_proj")),
    ):
        for name in names:
            rows, columns = axes.of(name)
            weight = torch.empty(rows.size, columns.size).normal_(std=RANDOM_STD, generator=generator)
            if name in ("o_proj", "down_proj"):
                weight *= 0.0  # keeps the signs
            yield f"{at}.{block}.{name}.weight", weight.half()
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{at}.{name}.weight", torch.ones(axes.hidden.size)


def _write_shards(out: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Files of about `SHARD_BYTES` and their index; never more than one of them in memory."""
    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    total = held = 0

    def flush() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        save_file(shard, out / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, tensor in tensors:
        shard[name] = tensor
        held += tensor.nbytes
        total += tensor.nbytes
        if held >= SHARD_BYTES:
            flush()
            held = 0
    if shard:
        flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def inflated_pair(to: str) -> Pair:
    """The pair grown to a named size: made once, kept in the user's cache by content.

    Raises `ConfigError` if there is no such size.
    """
    if to not in SIZES:
        raise ConfigError(f"the pair can be grown to {', '.join(SIZES)}, not {to}")
    found = []
    for name, source, size in zip(Pair._fields, BUNDLED, SIZES[to], strict=True):
        key = hashlib.sha256(f"{VERSION}|{asdict(size)}|".encode() + checkpoint_digest(source)).hexdigest()
        place = cache_folder() / "inflated" / f"{to}-{name}-{key[:16]}"
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
                grow(source, size, Path(scratch) / name)
                (Path(scratch) / name).rename(place)  # whoever sees the name sees a whole checkpoint
        found.append(place)
    return Pair(*found)


def write_pair(to: str, folder: Path) -> Pair:
    """The pair grown to a named size, in a folder of the caller's. Raises `ConfigError` if it is taken."""
    pair = Pair(folder / "target", folder / "draft")
    for source, size, place in zip(BUNDLED, SIZES[to], pair, strict=True):
        grow(source, size, place)
    return pair


def describe(pair: Pair) -> str:
    """Parameters of both, from their configs."""
    sizes = [ModelGeometry.from_path(path).num_parameters for path in pair]
    return f"target {sizes[0] / 1e6:.1f}M, draft {sizes[1] / 1e6:.1f}M parameters"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--to", choices=SIZES, required=True, help="whose cost")
    parser.add_argument("--out", type=Path, help="folder for target/ and draft/; the user's cache by default")
    options = parser.parse_args()
    pair = write_pair(options.to, options.out) if options.out else inflated_pair(options.to)
    print(f"{describe(pair)}\n{pair.target}\n{pair.draft}")


if __name__ == "__main__":
    main()
