"""Others on the same pair and prompts: whole requests, prompt included, one at a time, greedy.

transformers runs in this process, OpenVINO GenAI in the Python that has it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from bench import greedy
from bench.inflate import Pair
from bench.measure import Spread, in_turn, interleave, rest
from bench.openvino.peer import OpenVino, Pipeline
from bench.speculation.rig import Rig
from bench.speculation.text import Tokens
from decode_worker.decoder import Decoder
from tandem.sampling import SamplingParams

TANDEM, TANDEM_PLAIN = "Tandem, k by what pays", "Tandem, plain"
OPENVINO_K = (3, 5)
ASSISTED_K = 3  # beside transformers' own default
DEFAULT_ASSISTANT_TOKENS, DEFAULT_THRESHOLD = 20, 0.4  # transformers' own
Arm = Callable[[Sequence[Tokens]], float]  # prompts to output tokens per second


@dataclass(frozen=True, slots=True)
class PeerRow:
    """Output tokens per second of whole requests, medians over rounds."""

    pair: str
    system: str
    tokens_per_s: Spread
    tandem_ratio: Spread  # Tandem over this system, within rounds


class Transformers:
    """`generate` on the same checkpoints in fp32, one prompt at a time: assisted generation takes no more."""

    def __init__(self, pair: Pair, output_tokens: int) -> None:
        self._target, self._draft = (_load(path) for path in pair)
        self._output_tokens = output_tokens

    def plain(self, prompts: Sequence[Tokens]) -> float:
        """Output tokens per second."""
        return self._complete(prompts)

    def assisted(self, prompts: Sequence[Tokens], k: int | None = None) -> float:
        """With transformers' default settings, or with k draft tokens whatever the draft thinks of them."""
        threshold = DEFAULT_THRESHOLD if k is None else 0.0
        self._draft.generation_config.update(
            num_assistant_tokens=k or DEFAULT_ASSISTANT_TOKENS,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=threshold,
        )
        return self._complete(prompts, assistant_model=self._draft)

    def _complete(self, prompts: Sequence[Tokens], **options: Any) -> float:
        began_s = time.perf_counter()
        for prompt in prompts:
            greedy.complete(self._target, [prompt], self._output_tokens, **options)
        return len(prompts) * self._output_tokens / (time.perf_counter() - began_s)


def _load(path: Path) -> Any:
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def tandem(rig: Rig, output_tokens: int) -> dict[str, Arm]:
    """Ourselves, speculative and plain."""
    sampling = SamplingParams(max_tokens=output_tokens, ignore_eos=True)

    def complete(decoder: Decoder, prompts: Sequence[Tokens]) -> float:
        began_s = time.perf_counter()
        rig.prefill(prompts)
        run = rig.run(decoder, prompts, 1, sampling)
        return run.num_tokens / (time.perf_counter() - began_s)

    return {TANDEM: partial(complete, rig.auto()), TANDEM_PLAIN: partial(complete, rig.plain)}


def transformers(pair: Pair, output_tokens: int) -> dict[str, Arm]:
    """Plain, and assisted as it comes and with few draft tokens."""
    peer = Transformers(pair, output_tokens)
    return {
        "transformers, plain": peer.plain,
        "transformers, assisted": peer.assisted,
        f"transformers, assisted, k={ASSISTED_K}": partial(peer.assisted, k=ASSISTED_K),
    }


def openvino_pipelines(pair: Pair) -> dict[str, Pipeline]:
    """What `openvino` asks for."""
    return {
        "plain": Pipeline(pair.target),
        "speculative": Pipeline(pair.target, pair.draft, cache_gb=1),
    }


def openvino(peer: OpenVino, output_tokens: int) -> dict[str, Arm]:
    """Plain, and speculative with several numbers of draft tokens."""

    def complete(k: int, prompts: Sequence[Tokens]) -> float:
        name = "speculative" if k else "plain"
        seconds, outputs = peer.complete(name, prompts, output_tokens, k=k)
        return sum(len(output) for output in outputs) / seconds

    return {
        "OpenVINO GenAI, plain": partial(complete, 0),
        **{f"OpenVINO GenAI, speculative, k={k}": partial(complete, k) for k in OPENVINO_K},
    }


def measure(name: str, everybody: dict[str, Arm], prompts: Sequence[Tokens]) -> list[PeerRow]:
    """All systems in turns, one round per prompt, after a warm-up on the first."""
    asked = [[prompt] for prompt in (prompts[0], *prompts)]
    arms = {system: in_turn(arm, asked) for system, arm in everybody.items()}
    rates = interleave(arms, len(prompts), after=rest)
    return [
        PeerRow(name, system, Spread.of(found), Spread.of_ratios(rates[TANDEM], found))
        for system, found in rates.items()
    ]
