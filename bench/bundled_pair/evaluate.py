"""Measurement of a finished pair: every figure of the model card comes from here.

Knows two loaded models and the held-out archives. Knows nothing of training.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from bench.bundled_pair.batches import chunks, evaluation_rows
from bench.bundled_pair.checkpoint import load
from bench.bundled_pair.corpus import TokenArchive, load_archive
from bench.bundled_pair.generate import continuations, prompts
from bench.bundled_pair.model import Llama, parameter_count
from bench.bundled_pair.unloop import looping

PROMPT_ROWS, PROMPT_TOKENS, NEW_TOKENS = 192, 64, 128
LOOKAHEAD = 3
SAMPLE_PROMPTS = (
    "def fibonacci(n):",
    "import os\n\ndef read_lines(path):\n",
    "class Stack:\n    def __init__(self):\n",
)


@torch.no_grad()
def on_text(target: Llama, draft: Llama, data: TokenArchive) -> dict[str, float]:
    """Losses, greedy agreement and overlap of both models on an archive, teacher-forced."""
    sums = dict.fromkeys(("target_nats", "draft_nats", "greedy_agreement", "overlap"), 0.0)
    count = 0
    device = target.cos.device
    for row in chunks(evaluation_rows(data, target.shape.context, device), 1):
        ours, theirs = target(row[:, :-1])[0], draft(row[:, :-1])[0]
        wanted = row[0, 1:]
        sums["target_nats"] += F.cross_entropy(ours, wanted, reduction="sum").item()
        sums["draft_nats"] += F.cross_entropy(theirs, wanted, reduction="sum").item()
        sums["greedy_agreement"] += (ours.argmax(-1) == theirs.argmax(-1)).sum().item()
        sums["overlap"] += torch.minimum(ours.softmax(-1), theirs.softmax(-1)).sum().item()
        count += wanted.numel()
    figures = {name: value / count for name, value in sums.items()}
    per_byte = len(data.tokens) / data.n_bytes / math.log(2)
    figures["target_bits_per_byte"] = figures["target_nats"] * per_byte
    figures["draft_bits_per_byte"] = figures["draft_nats"] * per_byte
    return {**figures, "tokens": count}


def accepted_lengths(matches: Tensor, lookahead: int) -> float:
    """Mean number of proposals accepted per round when the draft proposes `lookahead` tokens.

    `matches` says for each position of the target's own output whether the draft had it.
    """
    accepted, rounds = 0, 0
    for row in matches.tolist():
        at = 0
        while at + lookahead < len(row):
            run = 0
            while run < lookahead and row[at + run]:
                run += 1
            accepted, rounds, at = accepted + run, rounds + 1, at + run + 1
    return accepted / max(1, rounds)


@torch.no_grad()
def on_own_output(target: Llama, draft: Llama, data: TokenArchive, temperature: float) -> dict[str, float]:
    """Agreement along what the target itself writes after held-out prompts."""
    device = target.cos.device
    start = prompts(data, PROMPT_ROWS, PROMPT_TOKENS, np.random.default_rng(7), aligned=0.5).to(device)
    heat = torch.full((PROMPT_ROWS,), temperature, device=device)
    out = continuations(target, start, NEW_TOKENS, heat, torch.Generator(device).manual_seed(7))
    match, overlap = [], []
    for row in chunks(out, 8):
        ours, theirs = (model(row[:, :-1])[:, PROMPT_TOKENS - 1 :] for model in (target, draft))
        match.append(ours.argmax(-1) == theirs.argmax(-1))
        overlap.append(torch.minimum(ours.softmax(-1), theirs.softmax(-1)).sum(-1))
    matches, shared, loops = torch.cat(match), torch.cat(overlap), looping(out[:, PROMPT_TOKENS:])
    figures = {
        "greedy_agreement": matches.float().mean().item(),
        "greedy_agreement_outside_loops": matches[~loops].float().mean().item(),
        "overlap": shared.mean().item(),
        "looping_share": loops.float().mean().item(),
    }
    if temperature == 0:
        figures["accepted_of_3"] = accepted_lengths(matches, LOOKAHEAD)
    else:  # each proposal is taken with the overlap's probability, all before it taken
        windows = shared.unfold(1, LOOKAHEAD, 1)
        figures["accepted_of_3"] = windows.cumprod(-1).sum(-1).mean().item()
    return figures


def samples(target: Llama, tokenizer: Tokenizer) -> dict[str, str]:
    """Greedy completions of the card's prompts."""
    texts = {}
    for prompt in SAMPLE_PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt).ids], device=target.cos.device)
        out = continuations(target, ids, NEW_TOKENS, torch.zeros(1, device=ids.device))
        texts[prompt] = tokenizer.decode(out[0, ids.shape[1] :].tolist(), skip_special_tokens=False)
    return texts


def evaluate(models: Path, corpus: Path, device: torch.device) -> dict[str, Any]:
    """All figures of the pair stored under `models`."""
    target, draft = (load(models / name).to(device) for name in ("target", "draft"))
    held_out = load_archive(corpus, "heldout")
    return {
        "parameters": {"target": parameter_count(target), "draft": parameter_count(draft)},
        "held_out_library": on_text(target, draft, held_out),
        "held_out_tests": on_text(target, draft, load_archive(corpus, "heldout_tests")),
        "along_greedy_output": on_own_output(target, draft, held_out, 0.0),
        "along_sampled_output": on_own_output(target, draft, held_out, 1.0),
        "samples": samples(target, Tokenizer.from_file(str(models / "target" / "tokenizer.json"))),
    }
