"""What a precision costs the target: perplexity of held-out text, and how often its choice changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench.inflate import Pair
from bench.speculation.agreement import WINDOW_TOKENS, logits_of
from bench.speculation.rig import BLOCK_SIZE
from bench.speculation.text import Tokens
from tandem.engine.loading import DRAFT_ACTIVATION_BITS
from tandem.engine.model_runner import ModelRunner
from tandem.errors import ConfigError
from tandem.geometry import num_blocks
from tandem.quantizations import ACTIVATION_BITS, AUTO_DRAFT, CODED, parse_quantization

Skip = Callable[[str, str], None]  # what, and why it is not measured
DRAFTED = ("int8", "nf4", "int4")  # precisions of drafts, of which the speed is measured too


@dataclass(frozen=True, slots=True)
class Quality:
    """Of a precision, over all positions of the text but the first of each window."""

    precision: str
    perplexity: float
    greedy_agreement: float  # with fp32
    divergence: float  # Kullback-Leibler, from fp32, in nats per token


def measure(path: Path, texts: Sequence[Tokens], skip: Skip) -> list[Quality]:
    """One row per precision that there is."""
    reference = _load(path, linear="fp32")
    expected = [logits_of(reference, text[:-1]).log_softmax(-1) for text in texts]
    rows = [_quality("fp32", reference, texts, expected)]
    for name, model in _models(_formats(path), skip):
        rows.append(_quality(name, model, texts, expected))
    return rows


def drafts(pair: Pair, skip: Skip) -> dict[str, ModelRunner]:
    """What may draft for the target: the draft model, and the target itself as a self-draft runs it."""
    wanted: list[tuple[str, Path, dict[str, Any]]] = [("draft model", pair.draft, {})]
    wanted += [(f"draft model, {name}", pair.draft, {"quantization": name}) for name in DRAFTED]
    weights, bits = parse_quantization(AUTO_DRAFT)
    wanted.append(
        (f"draft model, {AUTO_DRAFT}", pair.draft, {"quantization": weights, "activation_bits": bits})
    )
    for name in DRAFTED:
        options = {"quantization": name, "activation_bits": DRAFT_ACTIVATION_BITS}
        wanted.append((f"the target in {name}", pair.target, options))
    return dict(_models(wanted, skip))


def _formats(path: Path) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """Every format of the target's weights, with whole and with quantized activations.

    Those of four bits are emulated: no hardware here multiplies them.
    """
    yield "fp16", path, {"linear": "fp16"}
    yield "bf16", path, {"quantization": "bf16"}
    for name in CODED:
        widths = {ACTIVATION_BITS: "", 8: ", 8-bit activations"}
        if name.startswith("int4"):
            widths[4] = ", W4A4 emulated"
        for bits, suffix in widths.items():
            yield name + suffix, path, {"quantization": name, "activation_bits": bits}


def _models(
    wanted: Iterable[tuple[str, Path, dict[str, Any]]], skip: Skip
) -> Iterator[tuple[str, ModelRunner]]:
    """Those that this machine can run, one after the other."""
    for name, path, options in wanted:
        try:
            yield name, _load(path, **options)
        except ConfigError as error:
            skip(name, str(error))


def _load(path: Path, **options: Any) -> ModelRunner:
    blocks = num_blocks(WINDOW_TOKENS, BLOCK_SIZE)
    return ModelRunner.load(path, num_blocks=blocks, block_size=BLOCK_SIZE, **options)


def _quality(
    name: str, model: ModelRunner, texts: Sequence[Tokens], expected: Sequence[torch.Tensor]
) -> Quality:
    nats = divergence = 0.0
    agreed = positions = 0
    for text, log_probs in zip(texts, expected, strict=True):
        ours = logits_of(model, text[:-1]).log_softmax(-1)
        nats += F.nll_loss(ours, torch.tensor(text[1:]), reduction="sum").item()
        divergence += F.kl_div(ours, log_probs, reduction="sum", log_target=True).item()
        agreed += int((ours.argmax(-1) == log_probs.argmax(-1)).sum())
        positions += len(text) - 1
    return Quality(name, math.exp(nats / positions), agreed / positions, divergence / positions)
