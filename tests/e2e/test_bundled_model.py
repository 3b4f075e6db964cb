"""The bundled model through the whole service equals transformers' `generate`: 200 prompts sent together."""

from __future__ import annotations

import argparse
import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from deploy.local import LocalCluster
from tandem.client import TandemClient
from tandem.config import BUNDLED_MODELS, ClusterConfig
from tandem.sampling import SamplingParams
from tandem.tokenizer import Tokenizer
from tests.e2e.harness import quiesce
from tests.e2e.reference import TIE

NUM_PROMPTS = 200
LONGEST = 1500
NUM_TOKENS = 16


def prompts() -> list[list[int]]:
    """Pieces of a library module; lengths from 1 to 1,500 tokens, spread evenly over magnitudes."""
    token_ids = Tokenizer.from_dir(BUNDLED_MODELS / "target").encode(Path(argparse.__file__).read_text())
    rng = random.Random(7)
    lengths = [1, 2, LONGEST, *(round(LONGEST ** rng.random()) for _ in range(NUM_PROMPTS - 3))]
    starts = [rng.randrange(len(token_ids) - length) for length in lengths]
    return [token_ids[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def reference(model: Any, prompt: list[int]) -> tuple[list[int], list[float]]:
    """The tokens, and by how much each led the second best."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    best = [logits[0].topk(2).values for logits in out.logits]
    return out.sequences[0, len(prompt) :].tolist(), [float(b[0] - b[1]) for b in best]


def positions_excused(wanted: list[int], leads: list[float], got: list[int]) -> int:
    """0 if equal; 1 if they part where the reference itself is undecided; anything else fails."""
    for position, (theirs, mine) in enumerate(zip(wanted, got, strict=False)):
        if theirs != mine:
            assert leads[position] < TIE, (position, theirs, mine, leads[position])
            return 1
    assert len(wanted) == len(got)
    return 0


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("number", [50, pytest.param(NUM_PROMPTS, marks=pytest.mark.long)])
async def test_mixed_prompts_equal_transformers(record_property: Any, number: int) -> None:
    sent = prompts()[:number]
    async with LocalCluster(ClusterConfig()) as cluster, TandemClient(cluster.address) as client:
        sampling = SamplingParams(max_tokens=NUM_TOKENS)
        responses = await asyncio.gather(*(client.generate(prompt, sampling) for prompt in sent))
        await quiesce(cluster)
    model = LlamaForCausalLM.from_pretrained(BUNDLED_MODELS / "target", dtype=torch.float32).eval()
    num_positions = num_excused = 0
    for prompt, response in zip(sent, responses, strict=True):
        wanted, leads = reference(model, prompt)
        num_positions += len(wanted)
        num_excused += positions_excused(wanted, leads, list(response.completions[0].token_ids))
    record_property("positions", num_positions)
    record_property("excused", num_excused)
    print(f"{num_positions} positions, {num_excused} excused as near ties")
    assert num_excused < 0.001 * num_positions
