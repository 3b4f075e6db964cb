"""Ourselves and transformers, each as a function from prompts to the seconds of both phases.

A prefill is timed as a completion of one token; decoding is the rest of a longer completion, of prompts that
begin otherwise, because some systems keep the KV of the last prompt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.utils import logging

from bench import greedy
from bench.inflate import Pair
from bench.openvino.peer import OpenVino
from bench.speculation.rig import Rig, Setup
from bench.speculation.text import Tokens
from bench.vllm.peer import VLlm
from tandem.geometry import num_blocks
from tandem.sampling import SamplingParams

PAGE_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Phases:
    """Seconds that a batch of prompts took."""

    prefill_s: float
    decode_s: float  # of all tokens after the first


Arm = Callable[[Sequence[Tokens]], Phases]


def _otherwise(prompts: Sequence[Tokens]) -> list[Tokens]:
    """The same number of tokens in another order."""
    return [prompt[1:] + prompt[:1] for prompt in prompts]


class Tandem:
    """The decode worker's plain decoder over a model that this process has prefilled, without a service."""

    def __init__(
        self, path: Path, quantization: str, most: int, prompt_tokens: int, output_tokens: int, threads: int
    ) -> None:
        setup = Setup(draft="none", target_precision=quantization)
        self._rig = Rig(Pair(path, path), setup, most, prompt_tokens + output_tokens, threads)
        self._sampling = SamplingParams(max_tokens=output_tokens - 1, ignore_eos=True)
        self.model = self._rig.engine.model

    def __call__(self, prompts: Sequence[Tokens]) -> Phases:
        began_s = time.perf_counter()
        self._rig.prefill(prompts)
        prefill_s = time.perf_counter() - began_s
        run = self._rig.run(self._rig.plain, prompts, len(prompts), self._sampling)
        return Phases(prefill_s, run.seconds)


class Transformers:
    """`generate` in fp32, the batch at once; all prompts have the same length, so nothing is padded."""

    def __init__(self, path: Path, output_tokens: int) -> None:
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        self._model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self._output_tokens = output_tokens

    def __call__(self, prompts: Sequence[Tokens]) -> Phases:
        first_s = self._complete(prompts, 1)
        whole_s = self._complete(_otherwise(prompts), self._output_tokens)
        return Phases(first_s, whole_s - first_s)

    def _complete(self, prompts: Sequence[Tokens], num_tokens: int) -> float:
        began_s = time.perf_counter()
        self._generate(prompts, num_tokens)
        return time.perf_counter() - began_s

    def _generate(self, prompts: Sequence[Tokens], num_tokens: int) -> None:
        greedy.complete(self._model, prompts, num_tokens)


class TransformersBatching(Transformers):
    """`generate_batch`: continuous batching over a paged cache, which every call sets up anew."""

    def _generate(self, prompts: Sequence[Tokens], num_tokens: int) -> None:
        count, length = len(prompts), len(prompts[0])
        pages = count * num_blocks(length + self._output_tokens, PAGE_TOKENS)
        room = ContinuousBatchingConfig(
            num_blocks=pages, page_size=PAGE_TOKENS, max_batch_tokens=count * length
        )
        ends = {"max_new_tokens": num_tokens, "eos_token_id": -1}  # it knows no least number of tokens
        asked = GenerationConfig(do_sample=False, **ends)  # type: ignore[no-untyped-call]
        ids = [list(prompt) for prompt in prompts]
        self._model.generate_batch(ids, generation_config=asked, continuous_batching_config=room)


class OpenVinoArm:
    """One pipeline of OpenVINO GenAI, the batch at once."""

    def __init__(self, peer: OpenVino, name: str, output_tokens: int) -> None:
        self._peer = peer
        self._name = name
        self._output_tokens = output_tokens

    def __call__(self, prompts: Sequence[Tokens]) -> Phases:
        first_s = self._complete(prompts, 1)
        whole_s = self._complete(_otherwise(prompts), self._output_tokens)
        return Phases(first_s, whole_s - first_s)

    def _complete(self, prompts: Sequence[Tokens], num_tokens: int) -> float:
        return self._peer.complete(self._name, prompts, num_tokens, together=True)[0]


class VLlmArm:
    """vLLM's engine, the batch at once."""

    def __init__(self, peer: VLlm, output_tokens: int) -> None:
        self._peer = peer
        self._output_tokens = output_tokens

    def __call__(self, prompts: Sequence[Tokens]) -> Phases:
        first_s = self._peer.complete(prompts, 1)[0]
        whole_s = self._peer.complete(_otherwise(prompts), self._output_tokens)[0]
        return Phases(first_s, whole_s - first_s)
