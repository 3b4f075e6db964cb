"""How often a draft agrees with its target, where loops cannot flatter it.

Greedy output of a small model tends to end in a loop, which any draft predicts: acceptance along it says
little about other text. So agreement is also measured on text nobody generated, and continuations that end
in a loop are counted apart. The headline is the figure without them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import eq
from statistics import fmean

import torch
from torch import Tensor

from bench.bundled_pair.corpus import TokenArchive
from bench.bundled_pair.evaluate import LOOKAHEAD, accepted_lengths
from bench.bundled_pair.unloop import looping
from bench.speculation.rig import BLOCK_SIZE, Rig
from bench.speculation.text import Tokens, prompts, windows
from tandem.engine.batch import SequenceRows
from tandem.engine.draw import Draw
from tandem.engine.model_runner import ModelRunner
from tandem.engine.rng import Stream
from tandem.engine.sampler import choose
from tandem.geometry import num_blocks
from tandem.sampling import SamplingParams

TEXT_WINDOWS, WINDOW_TOKENS = 16, 256
PROMPTS, PROMPT_TOKENS, OUTPUT_TOKENS = 48, 64, 128
BATCH = 16


@dataclass(frozen=True, slots=True)
class Corpus:
    """Texts of one kind, all of one length."""

    name: str
    texts: Sequence[Tokens]
    first: int  # positions before it are given, not judged
    share: float = 1.0  # of all texts that were made the same way
    temperature: float = 0.0


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of a draft with its target at the positions of one kind of text."""

    draft: str
    along: str
    share: float
    positions: int
    greedy: float  # positions at which both have the same likeliest token
    overlap: float  # Σ min(target, draft): the chance that speculative sampling accepts
    same_draw: float  # positions at which both draw the same token with the same numbers, as under `exact`
    accepted_of_3: float  # expected when three tokens are drafted: greedy, or by the overlap if sampled


def logits_of(model: ModelRunner, tokens: Sequence[int]) -> Tensor:
    """Teacher-forced: `[len(tokens), vocab]` float32. Overwrites the cache's first blocks."""
    table = range(num_blocks(len(tokens), BLOCK_SIZE))
    return model.forward(model.batch([SequenceRows(tokens, 0, table, num_logits=len(tokens))]))


def agreements(target: ModelRunner, drafts: Mapping[str, ModelRunner], corpus: Corpus) -> list[Agreement]:
    """One per draft. Distributions are those at the corpus' temperature, or at 1 if that is greedy."""
    heat = corpus.temperature or 1.0
    matches: dict[str, list[Tensor]] = {name: [] for name in drafts}
    overlaps: dict[str, list[Tensor]] = {name: [] for name in drafts}
    same: dict[str, list[bool]] = {name: [] for name in drafts}
    for seed, tokens in enumerate(corpus.texts):
        ours = logits_of(target, tokens[:-1])[corpus.first - 1 :]
        best, probs = ours.argmax(-1), (ours / heat).softmax(-1)
        draws = [Draw(seed, position, Stream.TOKEN, heat, 1.0, 0.0, 0) for position in range(len(ours))]
        drawn = choose(ours, draws)
        for name, draft in drafts.items():
            theirs = logits_of(draft, tokens[:-1])[corpus.first - 1 :]
            matches[name].append(best == theirs.argmax(-1))
            overlaps[name].append(torch.minimum(probs, (theirs / heat).softmax(-1)).sum(-1))
            same[name] += map(eq, drawn, choose(theirs, draws))
    return [
        _agreement(name, corpus, torch.stack(matches[name]), torch.stack(overlaps[name]), fmean(same[name]))
        for name in drafts
    ]


def _agreement(draft: str, corpus: Corpus, match: Tensor, overlap: Tensor, same_draw: float) -> Agreement:
    """From what was found at each position: `match` and `overlap` [texts, positions]."""
    by_chance = overlap.unfold(1, LOOKAHEAD, 1).cumprod(-1).sum(-1).mean().item()
    return Agreement(
        draft=draft,
        along=corpus.name,
        share=corpus.share,
        positions=match.numel(),
        greedy=match.float().mean().item(),
        overlap=overlap.mean().item(),
        same_draw=same_draw,
        accepted_of_3=by_chance if corpus.temperature else accepted_lengths(match, LOOKAHEAD),
    )


def by_looping(texts: Sequence[Tokens], prompt_tokens: int) -> tuple[list[Tokens], list[Tokens]]:
    """Texts whose continuation does not end in a loop, and those whose continuation does."""
    loops = looping(torch.tensor(texts)[:, prompt_tokens:]).tolist()
    pairs = list(zip(texts, loops, strict=True))
    return [text for text, is_loop in pairs if not is_loop], [text for text, is_loop in pairs if is_loop]


def corpora(rig: Rig, data: TokenArchive, temperature: float) -> list[Corpus]:
    """Held-out text, the target's own greedy output and its samples, loops apart."""
    found = [Corpus("held-out text", windows(data, TEXT_WINDOWS, WINDOW_TOKENS), first=1)]
    asked = prompts(data, PROMPTS, PROMPT_TOKENS)
    for name, heat in (("greedy output", 0.0), (f"samples at {temperature}", temperature)):
        sampling = SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True, temperature=heat)
        outputs = rig.outputs(asked, BATCH, sampling)
        texts = [prompt + output for prompt, output in zip(asked, outputs, strict=True)]
        parts = by_looping(texts, PROMPT_TOKENS)
        for what, part in zip(("", ", looping"), parts, strict=True):
            if part:
                found.append(Corpus(name + what, part, PROMPT_TOKENS, len(part) / len(texts), heat))
    return found
