"""How often a draft agrees with its target, where loops cannot flatter it.

Greedy output of a small model tends to end in a loop, which any draft predicts: acceptance along it says
little about other text. So agreement is also measured on text nobody generated, and continuations that end
in a loop are counted apart. The headline is the figure without them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
    modesty: (
        float  # a token of which the draft is sure with p is the target's greedy one with about p ** modesty
    )
    accepted_of_3: float  # expected when three tokens are drafted: greedy, or by the overlap if sampled


def logits_of(model: ModelRunner, tokens: Sequence[int]) -> Tensor:
    """Teacher-forced: `[len(tokens), vocab]` float32. Overwrites the cache's first blocks."""
    table = range(num_blocks(len(tokens), BLOCK_SIZE))
    return model.forward(model.batch([SequenceRows(tokens, 0, table, num_logits=len(tokens))]))


def agreements(target: ModelRunner, drafts: Mapping[str, ModelRunner], corpus: Corpus) -> list[Agreement]:
    """One per draft. Distributions are those at the corpus' temperature, or at 1 if that is greedy."""
    found = {name: _Found() for name in drafts}
    for seed, tokens in enumerate(corpus.texts):
        ours = logits_of(target, tokens[:-1])[corpus.first - 1 :]
        for name, draft in drafts.items():
            found[name].add(ours, logits_of(draft, tokens[:-1])[corpus.first - 1 :], corpus, seed)
    return [each.agreement(name, corpus) for name, each in found.items()]


@dataclass(slots=True)
class _Found:
    """At the positions of each text."""

    match: list[Tensor] = field(default_factory=list)
    overlap: list[Tensor] = field(default_factory=list)
    same_draw: list[bool] = field(default_factory=list)
    confidence: list[Tensor] = field(default_factory=list)

    def add(self, ours: Tensor, theirs: Tensor, corpus: Corpus, seed: int) -> None:
        """One more text, by the logits `[positions, vocab]` of the target and of the draft."""
        heat = corpus.temperature or 1.0
        draws = [Draw(seed, position, Stream.TOKEN, heat, 1.0, 0.0, 0) for position in range(len(ours))]
        self.match.append(ours.argmax(-1) == theirs.argmax(-1))
        self.overlap.append(torch.minimum((ours / heat).softmax(-1), (theirs / heat).softmax(-1)).sum(-1))
        self.same_draw += map(eq, choose(ours, draws), choose(theirs, draws))
        self.confidence.append(theirs.double().softmax(-1).amax(-1))

    def agreement(self, draft: str, corpus: Corpus) -> Agreement:
        match, overlap = torch.stack(self.match), torch.stack(self.overlap)
        by_chance = overlap.unfold(1, LOOKAHEAD, 1).cumprod(-1).sum(-1).mean().item()
        greedy = match.float().mean().item()
        return Agreement(
            draft=draft,
            along=corpus.name,
            share=corpus.share,
            positions=match.numel(),
            greedy=greedy,
            overlap=overlap.mean().item(),
            same_draw=fmean(self.same_draw),
            modesty=modesty(torch.cat(self.confidence), greedy),
            accepted_of_3=by_chance if corpus.temperature else accepted_lengths(match, LOOKAHEAD),
        )


def modesty(confidence: Tensor, share: float) -> float:
    """The power of its confidence `[positions]` with which a draft is right on average; 1 is honest, less is
    modest. Between 0 and 4."""
    low, high = 0.0, 4.0
    for _ in range(30):
        middle = (low + high) / 2
        if (confidence**middle).mean().item() > share:
            low = middle
        else:
            high = middle
    return low


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
