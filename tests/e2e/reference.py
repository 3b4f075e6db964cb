"""What the tiny checkpoint says without any of our code: transformers, one prompt at a time."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import LlamaForCausalLM

from tests.checkpoints import EOS, tiny_llama

TIE = 1e-4  # a reference whose two best logits lie this close may go either way


@functools.cache
def model() -> Any:
    return LlamaForCausalLM.from_pretrained(tiny_llama()).eval()


@functools.cache
def greedy(prompt: tuple[int, ...], max_tokens: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """transformers' `generate`: the tokens, and by how much each led the second best."""
    with torch.inference_mode():
        out = model().generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=EOS,
            return_dict_in_generate=True,
            output_logits=True,
        )
    best = [logits[0].topk(2).values for logits in out.logits]
    return tuple(out.sequences[0, len(prompt) :].tolist()), tuple(float(b[0] - b[1]) for b in best)


def logits(token_ids: Sequence[int]) -> torch.Tensor:
    """At every position, [num_tokens, vocab_size]."""
    with torch.inference_mode():
        found: torch.Tensor = model()(torch.tensor([list(token_ids)])).logits[0]
    return found


def greedy_with(
    prompt: Sequence[int], max_tokens: int, change: Callable[[torch.Tensor, list[int]], torch.Tensor]
) -> list[int]:
    """Greedy decoding of logits changed by a function of (logits, output so far)."""
    output: list[int] = []
    while len(output) < max_tokens and output[-1:] != [EOS]:
        raw = logits([*prompt, *output])[-1]
        output.append(int(change(raw.clone(), output).argmax()))
    return output


def mixed_prompts(count: int, longest: int, seed: int = 1) -> list[tuple[int, ...]]:
    """Random bytes; lengths from 1 to `longest`, block and chunk borders among them."""
    rng = random.Random(seed)
    borders = [n for n in (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129) if n <= longest]
    lengths = [*borders, *(rng.randint(1, longest) for _ in range(count))][:count]
    return [tuple(rng.randrange(256) for _ in range(length)) for length in lengths]


def near_ties(got: Sequence[int], prompt: tuple[int, ...], max_tokens: int) -> int:
    """Compare with transformers. Returns 1 if the outputs part at a near tie; anything else raises."""
    wanted, leads = greedy(prompt, max_tokens)
    for position, (mine, theirs) in enumerate(zip(got, wanted, strict=False)):
        if mine != theirs:
            assert leads[position] < TIE, (position, mine, theirs, leads[position])
            return 1
    assert len(got) == len(wanted), (len(got), len(wanted))
    return 0
