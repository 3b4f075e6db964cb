"""Prefill and decode rates of everybody in turns, cell by cell, and how far the machine's limits are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.limits import Limits, limits
from bench.measure import (
    Meter,
    Spread,
    console,
    flat,
    in_turn,
    interleave,
    machine,
    rest,
    table,
    write_csv,
    write_json,
)
from bench.openvino import peer as openvino_peer
from bench.openvino.peer import Pipeline
from bench.peers.arms import Arm, OpenVinoArm, Phases, Tandem, Transformers, TransformersBatching, VLlmArm
from bench.profile import record
from bench.shapes import checkpoint
from bench.speculation.text import Tokens
from bench.vllm import peer as vllm_peer
from tandem.errors import ConfigError
from tandem.geometry import ModelGeometry

OUTPUT_TOKENS = 64
CELLS = {128: (1, 4, 8, 16), 1024: (1, 4)}  # prompt tokens → batch sizes
PRECISIONS = {"fp16": "none", "bf16": "bf16", "int8": "int8", "int8-a8": "int8-a8", "nf4": "nf4"}
BITS = {
    "fp16": 16.0,
    "bf16": 16.0,
    "int8": 8.0,
    "int8-a8": 8.0,
    "nf4": 4.5,
}  # of a linear weight
OPENVINO_BITS = {"as stored": 16, "int8": 8, "int4": 4}
CACHE_GB = 2
BASE = "Tandem fp16"


@dataclass(frozen=True, slots=True)
class Options:
    """What to run, and where."""

    shape: str
    rounds: int
    threads: int
    openvino_python: Path | None
    out: Path
    vllm_python: Path | None = None
    profile: Path | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One system in one cell. Ratios are Tandem fp16 over it, within rounds."""

    prompt_tokens: int
    batch: int
    system: str
    prefill_tokens_per_s: Spread
    prefill_ratio: Spread
    decode_tokens_per_s: Spread
    decode_ratio: Spread


def run(options: Options, as_json: bool) -> dict[str, Any]:
    """Measure, print the tables, write CSV and JSON; the document that was written.

    Raises `ConfigError` for a shape that there is not.
    """
    torch.set_num_threads(options.threads)
    path = checkpoint(options.shape)
    shown, found = console(as_json), limits(options.threads)
    geometry = ModelGeometry.from_path(path)
    rows: list[Row] = []
    skipped: list[str] = []
    with ExitStack() as stack, Meter("peers", sum(map(len, CELLS.values()))) as meter:
        others = _others(path, options, stack, skipped)
        for prompt_tokens, batches in CELLS.items():
            everybody = _everybody(path, prompt_tokens, max(batches), options.threads) | others
            for batch in batches:
                meter.say(f"{prompt_tokens} tokens in, batch {batch}")
                rows += _cell(everybody, prompt_tokens, batch, geometry.vocab_size, options.rounds)
                content = _write(options, found, rows, skipped)  # what is measured is kept, however this ends
                meter.step()
            if options.profile is not None:
                _profile(everybody, options.profile, prompt_tokens, geometry.vocab_size, shown)
    _show(rows, found, geometry, options, shown)
    for line in skipped:
        shown.print(f"not measured: {line}")
    return content


def _write(options: Options, found: Limits, rows: Sequence[Row], skipped: Sequence[str]) -> dict[str, Any]:
    content = {
        "machine": machine(options.threads),
        "limits": flat(found),
        "shape": options.shape,
        "output_tokens": OUTPUT_TOKENS,
        "rows": [flat(row) for row in rows],
        "skipped": list(skipped),
    }
    write_csv(options.out / "peers.csv", [flat(row) for row in rows])
    write_json(options.out / "peers.json", content)
    return content


def _everybody(path: Path, prompt_tokens: int, most: int, threads: int) -> dict[str, Arm]:
    """Those that run in this process."""
    systems: dict[str, Arm] = {
        f"Tandem {name}": Tandem(path, quantization, most, prompt_tokens, OUTPUT_TOKENS, threads)
        for name, quantization in PRECISIONS.items()
    }
    return systems | {
        "transformers fp32": Transformers(path, OUTPUT_TOKENS),
        "transformers generate_batch fp32": TransformersBatching(path, OUTPUT_TOKENS),
    }


def _pipelines(path: Path) -> dict[str, Pipeline]:
    """Continuous batching in every precision, and the simple pipeline as the weights are stored."""
    batching = {
        f"OpenVINO GenAI {name}": Pipeline(path, bits=bits, cache_gb=CACHE_GB)
        for name, bits in OPENVINO_BITS.items()
    }
    return batching | {"OpenVINO GenAI simple, as stored": Pipeline(path)}


def _others(path: Path, options: Options, stack: ExitStack, skipped: list[str]) -> dict[str, Arm]:
    """Those that run in processes of their own, until the stack closes; what cannot is said in `skipped`."""
    found: dict[str, Arm] = {}
    try:
        if options.openvino_python:
            running = openvino_peer.running(options.openvino_python, _pipelines(path), options.threads)
            peer = stack.enter_context(running)
            found |= {name: OpenVinoArm(peer, name, OUTPUT_TOKENS) for name in _pipelines(path)}
    except ConfigError as error:
        skipped.append(f"OpenVINO GenAI: {error}")
    try:
        if options.vllm_python:
            vllm = stack.enter_context(vllm_peer.running(options.vllm_python, _settings(path, options)))
            vllm.complete([(1, 2, 3)], 1)  # loads the model, or says why it cannot
            found["vLLM fp32"] = VLlmArm(vllm, OUTPUT_TOKENS)
    except ConfigError as error:
        skipped.append(f"vLLM: {error}")
    return found


def _settings(path: Path, options: Options) -> vllm_peer.Settings:
    """Room for the largest cell."""
    return vllm_peer.Settings(
        str(path),
        options.threads,
        max_sequences=max(map(max, CELLS.values())),
        max_tokens=max(CELLS) + OUTPUT_TOKENS,
        cache_gb=CACHE_GB,
    )


def _profile(everybody: Mapping[str, Arm], folder: Path, prompt_tokens: int, vocab: int, shown: Any) -> None:
    """One more prompt through each of ours, and where the time of its steps went."""
    prompts = _prompts(1, prompt_tokens, vocab)
    for name, arm in everybody.items():
        if isinstance(arm, Tandem):
            label = f"{name.replace(' ', '-').lower()}-{prompt_tokens}"
            shown.print(record(folder, label, arm.model, partial(arm, prompts)), markup=False)


def _cell(
    everybody: Mapping[str, Arm], prompt_tokens: int, batch: int, vocab: int, rounds: int
) -> Iterator[Row]:
    asked = [_prompts(batch, prompt_tokens, vocab, number) for number in range(1 + rounds)]
    # Other prompts in each round, so that nobody has their KV; the same ones for everybody.
    arms = {name: in_turn(arm, asked) for name, arm in everybody.items()}
    times = interleave(arms, rounds, after=rest)
    rates = {
        name: [_rates(phases, batch, prompt_tokens) for phases in found] for name, found in times.items()
    }
    base = rates[BASE]
    for name, found in rates.items():
        yield Row(
            prompt_tokens,
            batch,
            name,
            Spread.of(prefill for prefill, _ in found),
            Spread.of_ratios((prefill for prefill, _ in base), (prefill for prefill, _ in found)),
            Spread.of(decode for _, decode in found),
            Spread.of_ratios((decode for _, decode in base), (decode for _, decode in found)),
        )


def _prompts(batch: int, length: int, vocab: int, number: int = 0) -> list[Tokens]:
    """Random tokens: with random weights one text is as good as another."""
    generator = torch.Generator().manual_seed(1000 * batch + number)
    ids = torch.randint(3, vocab, (batch, length), generator=generator)
    return [tuple(row) for row in ids.tolist()]


def _rates(phases: Phases, batch: int, prompt_tokens: int) -> tuple[float, float]:
    """Prompt tokens and output tokens per second."""
    return batch * prompt_tokens / phases.prefill_s, batch * (OUTPUT_TOKENS - 1) / max(phases.decode_s, 1e-9)


def _show(rows: Sequence[Row], found: Limits, geometry: ModelGeometry, options: Options, shown: Any) -> None:
    shown.print(
        f"this machine, {options.threads} threads: {found.bytes_per_s / 1e9:.1f} GB/s, "
        f"{found.flops / 1e9:.0f} GFLOP/s (fp32)"
    )
    shown.print(
        table(
            f"{options.shape}, {OUTPUT_TOKENS} tokens out; ratios are {BASE} over the system (low…high)",
            ("prompt", "batch", "system", "prefill, tokens/s", "ratio", "decode, tokens/s", "ratio"),
            (
                (
                    str(row.prompt_tokens),
                    str(row.batch),
                    row.system,
                    f"{row.prefill_tokens_per_s.median:.0f}",
                    _range(row.prefill_ratio),
                    f"{row.decode_tokens_per_s.median:.1f}",
                    _range(row.decode_ratio),
                )
                for row in rows
            ),
            left=3,
        )
    )
    shown.print(
        table(
            "Tandem and the limits: decode at batch 1 against memory, prefill against arithmetic",
            ("prompt", "precision", "decode, of the memory limit", "prefill, of the arithmetic limit"),
            (
                (str(prompt), name, f"{100 * decode:.0f} %", f"{100 * prefill:.0f} %")
                for prompt, name, decode, prefill in shares(rows, found, geometry)
            ),
            left=2,
        )
    )


def shares(
    rows: Sequence[Row], found: Limits, geometry: ModelGeometry
) -> Iterator[tuple[int, str, float, float]]:
    """Share of the machine's limits at batch 1, by prompt length and precision.

    A decode step reads every weight once; a prompt token costs two operations per weight, attention apart.
    """
    embedding = geometry.vocab_size * geometry.hidden_size
    linear = geometry.num_parameters - embedding
    for row in rows:
        name = row.system.removeprefix("Tandem ")
        if row.batch == 1 and row.system.startswith("Tandem "):
            step_bytes = linear * BITS[name] / 8 + 2 * embedding
            decode = row.decode_tokens_per_s.median * step_bytes / found.bytes_per_s
            yield row.prompt_tokens, name, decode, 2 * linear * row.prefill_tokens_per_s.median / found.flops


def _range(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.low:.2f}…{spread.high:.2f})"
