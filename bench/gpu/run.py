"""The engine on one GPU beside transformers' `generate`: random weights in Llama shapes, no service around.

Decode steps and prefills of the general path (transformers' modules, packed rows, our paged cache) in turns
with `generate` on the same weights, in bfloat16 (float32 on a CPU), and the share of what a copy of memory
reaches in the same run. A decode step reads the weights of all linear layers, head included, and the KV of
its sequences. gpu.md and gpu.json are in the folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.forward.rig import timed
from bench.gpu.model import RandomModel
from bench.measure import Sheet, Spread, flat, interleave, machine, write_json
from bench.speculation.text import Tokens
from tandem.errors import ConfigError

DEFAULT = ("1b", "8b")
BATCHES = (1, 4, 16)
PROMPT_TOKENS, OUTPUT_TOKENS = 128, 64
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
COPY_ROUNDS = 10
NOTE = "ratios are Tandem over transformers' `generate` within rounds (low…high)"


@dataclass(frozen=True, slots=True)
class Options:
    """What to run, and where."""

    device: str
    shapes: tuple[str, ...]
    rounds: int
    out: Path


@dataclass(frozen=True, slots=True)
class Row:
    """One shape and batch. Rates are tokens per second of all sequences together."""

    shape: str
    batch: int
    prefill_tokens_per_s: Spread
    prefill_ratio: Spread
    decode_tokens_per_s: Spread
    decode_ratio: Spread
    bandwidth_share: float  # of the measured copy, at the median
    same_tokens: float  # share of output positions where both chose the same token


def run(options: Options) -> str:
    """Measure and write the files; the table as Markdown. Raises `ConfigError` without such a device."""
    if options.device not in COPY_BYTES:
        raise ConfigError(f"--device must be cuda or cpu, not {options.device}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("torch finds no GPU here; --device cpu --shape tiny tries the code without one")
    bandwidth = copy_bytes_per_s(options.device)
    rows: list[Row] = []
    skipped: list[str] = []
    for shape in options.shapes:
        try:
            rows += _shape(shape, options, bandwidth)
        except torch.OutOfMemoryError as error:
            skipped.append(f"{shape}: {str(error).partition('.')[0]}")
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    content = {
        "machine": machine(torch.get_num_threads()),
        "device": name,
        "transformers": transformers.__version__,
        "copy_bytes_per_s": bandwidth,
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
        "rows": [flat(row) for row in rows],
        "skipped": skipped,
    }
    write_json(options.out / "gpu.json", content)
    text = markdown(rows, content)
    (options.out / "gpu.md").write_text(text)
    return text


def copy_bytes_per_s(device: str) -> float:
    """The best of some copies; each byte is read once and written once."""
    source = torch.ones(COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = min(timed(lambda: target.copy_(source), device) for _ in range(COPY_ROUNDS))
    return 2 * COPY_BYTES[device] / seconds


def _shape(shape: str, options: Options, bandwidth: float) -> Iterator[Row]:
    model = RandomModel(shape, options.device, max(BATCHES), PROMPT_TOKENS + OUTPUT_TOKENS)
    for batch in BATCHES:
        prompts = _prompts(batch, model.geometry.vocab_size)
        arms = {arm: partial(arm, prompts, OUTPUT_TOKENS) for arm in (model.ours, model.theirs)}
        found = interleave({arm.__name__: call for arm, call in arms.items()}, options.rounds)
        yield _row(shape, model, found["ours"], found["theirs"], bandwidth)


Found = Sequence[tuple[float, float, list[Tokens]]]


def _row(shape: str, model: RandomModel, ours: Found, theirs: Found, bandwidth: float) -> Row:
    batch = len(ours[0][2])
    num_decoded = batch * (OUTPUT_TOKENS - 1)
    decode = Spread.of(num_decoded / seconds for _, seconds, _ in ours)
    context = PROMPT_TOKENS + OUTPUT_TOKENS / 2
    step_bytes = model.step_bytes + batch * context * model.geometry.kv_bytes_per_token(model.dtype)
    pairs = [
        mine == other
        for outputs in zip(ours[-1][2], theirs[-1][2], strict=True)
        for mine, other in zip(*outputs, strict=True)
    ]
    return Row(
        shape,
        batch,
        Spread.of(batch * PROMPT_TOKENS / seconds for seconds, _, _ in ours),
        Spread.of_ratios((s for s, _, _ in theirs), (s for s, _, _ in ours)),
        decode,
        Spread.of_ratios((s for _, s, _ in theirs), (s for _, s, _ in ours)),
        step_bytes * decode.median / batch / bandwidth,
        sum(pairs) / len(pairs),
    )


def _prompts(batch: int, vocab: int) -> list[Tokens]:
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(3, vocab, (batch, PROMPT_TOKENS), generator=generator)
    return [tuple(row) for row in ids.tolist()]


def markdown(rows: Sequence[Row], content: dict[str, Any]) -> str:
    """The device, the limit and the table."""
    columns = (
        "shape",
        "batch",
        "prefill, tokens/s",
        "ratio",
        "decode, tokens/s",
        "ratio",
        "of the bandwidth",
    )
    sheet = Sheet("", (*columns, "same tokens"), [_cells(row) for row in rows], left=1)
    versions = f"torch {content['machine']['torch']}, transformers {content['transformers']}"
    limit = f"copy {content['copy_bytes_per_s'] / 1e9:.1f} GB/s"
    about = f"{PROMPT_TOKENS} tokens in, {OUTPUT_TOKENS} out; {NOTE}"
    skipped = "".join(f"\nNot measured: {line}.\n" for line in content["skipped"])
    return f"{content['device']}, {versions}, {limit}. {about}.\n\n{sheet.markdown()}\n{skipped}"


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.shape,
        str(row.batch),
        f"{row.prefill_tokens_per_s.median:.0f}",
        _range(row.prefill_ratio),
        f"{row.decode_tokens_per_s.median:.1f}",
        _range(row.decode_ratio),
        f"{100 * row.bandwidth_share:.0f} %",
        f"{100 * row.same_tokens:.1f} %",
    )


def _range(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.low:.2f}…{spread.high:.2f})"
