"""`tandem plan`: the memory arithmetic of a model, from its config.json alone."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from deploy.models import resolve_model
from tandem.config import CacheConfig
from tandem.errors import ConfigError
from tandem.geometry import DTYPE_BYTES, ModelGeometry, num_blocks
from tandem.quantizations import AUTO, AUTO_SELF_DRAFT, natural_kv_dtype, parse_quantization

# With the scales of their groups.
BITS_PER_WEIGHT = {"bf16": 16.0, "int8": 8.0, "nf4": 4.5, "fp4": 4.5, "int4": 4.25}
OUTLIER_BITS = 8 / 32  # more, where one input in 32 is kept in eight bits beside them
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


@dataclass(frozen=True, slots=True)
class Sides:
    """The model and what drafts for it. A self-draft has weights of its own and no KV."""

    model: ModelGeometry
    dtype: str
    quantization: str = "none"
    draft: ModelGeometry | None = None
    draft_quantization: str = "none"
    draft_has_kv: bool = False

    @classmethod
    def of(
        cls, model: str | None, draft: str | None, dtype: str, quantization: str, draft_quantization: str
    ) -> Sides:
        """From the words of the command line. Raises `ConfigError` for what cannot be planned."""
        if dtype not in DTYPE_BYTES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, not {dtype}")
        if draft_quantization == AUTO:  # a draft model may stay whole
            draft_quantization = AUTO_SELF_DRAFT if draft == "self" else "none"
        for name in (quantization, draft_quantization):
            parse_quantization(name)
        geometry = ModelGeometry.from_path(resolve_model(model))
        if draft is None:
            return cls(geometry, dtype, quantization)
        is_self = draft == "self"
        other = geometry if is_self else ModelGeometry.from_path(resolve_model(draft))
        return cls(geometry, dtype, quantization, other, draft_quantization, not is_self)

    def weights_bytes(self) -> int:
        return weights_bytes(self.model, self.dtype, self.quantization)

    def draft_weights_bytes(self) -> int:
        return weights_bytes(self.draft, self.dtype, self.draft_quantization) if self.draft else 0

    @property
    def kv_dtype(self) -> str:
        return natural_kv_dtype(*parse_quantization(self.quantization), self.dtype)

    def draft_block_bytes(self, block_size: int) -> int:
        return self.draft.block_bytes(block_size, self.kv_dtype) if self.draft and self.draft_has_kv else 0


def weights_bytes(geometry: ModelGeometry, dtype: str, quantization: str) -> int:
    """Bytes of the weights; the embedding and the head stay whole, as everywhere."""
    if quantization == "none":
        return geometry.weights_bytes(dtype)
    whole = geometry.vocab_size * geometry.hidden_size  # once more if the head has weights of its own
    share = (geometry.num_parameters - whole) / geometry.num_parameters
    bits = BITS_PER_WEIGHT[quantization.partition("-")[0]]
    bits += OUTLIER_BITS if "outliers" in quantization else 0.0
    all_bytes = geometry.weights_bytes(dtype)
    return round(all_bytes * (1 - share) + geometry.num_parameters * share * bits / 8)


def run(sides: Sides, context: int | None, batch: int, memory: str, block_size: int, as_json: bool) -> None:
    """Print the plan. Raises `ConfigError` for what cannot be planned."""
    facts = plan(sides, context or sides.model.max_context, batch, parse_bytes(memory), block_size)
    if as_json:
        print(json.dumps(facts))
    else:
        _show(facts, batch)


def parse_bytes(text: str) -> int | None:
    """`80GiB`, `8e9` or `512MB` in bytes; None for an empty text."""
    if not text:
        return None
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmg]i?)?b?\s*", text, re.IGNORECASE)
    if match is None:
        raise ConfigError(f"cannot read {text!r} as a size; write it like 80GiB or 512MB")
    return int(float(match[1]) * UNITS[(match[2] or "").lower()])


def plan(sides: Sides, context: int, batch: int, memory: int | None, block_size: int) -> dict[str, Any]:
    """What model and draft take at this context and batch, and what fits into `memory` bytes.

    Draft tokens need no slots of their own: they never reach past the end that a request may have.

    Without `memory` the service's default KV budget of a decode worker is what must hold the KV.
    """
    geometry, dtype = sides.model, sides.kv_dtype
    weights = sides.weights_bytes() + sides.draft_weights_bytes()
    block_bytes = geometry.block_bytes(block_size, dtype) + sides.draft_block_bytes(block_size)
    kv_budget = CacheConfig().decode_bytes if memory is None else max(memory - weights, 0)
    blocks = kv_budget // block_bytes
    tokens_at_batch = blocks // batch * block_size
    return {
        "weights_bytes": sides.weights_bytes(),
        "draft_weights_bytes": sides.draft_weights_bytes(),
        "draft_kv_bytes_per_token": sides.draft_block_bytes(block_size) // block_size,
        "kv_bytes_per_token": geometry.kv_bytes_per_token(dtype),
        "kv_bytes_per_request": geometry.kv_bytes(context, dtype),
        "kv_bytes_at_batch": geometry.kv_bytes(context, dtype, batch),
        "block_bytes": block_bytes,
        "kv_budget_bytes": kv_budget,
        "num_blocks": blocks,
        "max_concurrent_requests": blocks // num_blocks(context, block_size),
        "max_tokens_at_batch": min(tokens_at_batch, geometry.max_context),
        "max_context": geometry.max_context,
        "context": context,
        "batch": batch,
        "dtype": sides.dtype,
    }


def _show(facts: dict[str, Any], batch: int) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    draft = (
        ("weights of the draft", _size(facts["draft_weights_bytes"])),
        ("KV of the draft per token", _size(facts["draft_kv_bytes_per_token"])),
    )
    rows = (
        (f"weights ({facts['dtype']}, from the config)", _size(facts["weights_bytes"])),
        *(draft if facts["draft_weights_bytes"] else ()),
        ("KV per token", _size(facts["kv_bytes_per_token"])),
        (f"KV per request of {facts['context']:,} tokens", _size(facts["kv_bytes_per_request"])),
        *(((f"KV of {batch} such requests", _size(facts["kv_bytes_at_batch"])),) if batch > 1 else ()),
        ("memory for KV", f"{_size(facts['kv_budget_bytes'])} = {facts['num_blocks']:,} blocks"),
        ("requests of that length that fit at once", f"{facts['max_concurrent_requests']:,}"),
        (f"longest sequence that fits {batch} at a time", f"{facts['max_tokens_at_batch']:,} tokens"),
    )
    for name, value in rows:
        table.add_row(name, value)
    console = Console(highlight=False)
    console.print(table)
    if not facts["kv_budget_bytes"]:
        console.print("[red]does not fit: the weights alone take more[/]")
    elif not facts["max_concurrent_requests"]:
        console.print(f"[red]does not fit: one request of {facts['context']:,} tokens takes more[/]")


def _size(num_bytes: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.2f} {name}"
    return f"{num_bytes} B"
