"""From logits to tokens: penalties, filters and the draw. Every row stands for itself.

`process_logits` is the one place where parameters act on logits, so that speculation can apply exactly
the same to the draft's and the target's side. Knows nothing of models, batches or requests.

Order: logit bias, penalties, min_tokens, temperature, top-k, top-p, min-p. The repetition penalty
counts prompt and output, presence and frequency count the output only. Logprobs are of the raw logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from tandem.engine.draw import Draw
from tandem.engine.native import library
from tandem.engine.native.kernels import kernels_for
from tandem.engine.rng import Stream, exponentials
from tandem.engine.sampling_state import SamplingState
from tandem.sampling import SamplingParams

NO_TOKEN = -1  # in place of the most probable token of a row without usable logits
_NEVER = float("-inf")

Waits = npt.NDArray[np.float64]


class SampledToken(NamedTuple):
    """A chosen token. `logprob` and `top` are of the model's own distribution, and empty unless asked for.

    A tuple, as each step makes one or more for each sequence.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most probable first


@dataclass(frozen=True, slots=True)
class BadLogits:
    """The model gave this row no usable distribution; only its request fails (`Internal.numerics`)."""


class Sampler:
    """Chooses one token per row. Holds no state: all of it is in `SamplingState`."""

    def sample(
        self,
        logits: torch.Tensor,  # [rows, vocab] float32, not changed
        states: Sequence[SamplingState],
        stream: Stream = Stream.TOKEN,
    ) -> list[SampledToken | BadLogits]:
        """One result per row. The states are read, not advanced."""
        if not states:
            return []
        is_changed = any(state.params.changes_logits for state in states)
        scores = _penalized(logits, states) if is_changed else logits
        token_ids = choose(scores, [state.draw(0, stream) for state in states], masked=is_changed)
        if is_changed:  # what is no number must not hide behind a bias
            is_good = logits.sum(-1).isfinite().tolist()
            token_ids = [i if good else NO_TOKEN for i, good in zip(token_ids, is_good, strict=True)]
        return [
            BadLogits() if token_id == NO_TOKEN else sampled_token(token_id, logits[i], state)
            for i, (token_id, state) in enumerate(zip(token_ids, states, strict=True))
        ]


def choose(scores: torch.Tensor, draws: Sequence[Draw], *, masked: bool = False) -> list[int]:
    """A token for each row of `scores` [rows, vocab] float32, by own kernels where they run: the very ones a
    forward chooses with. `NO_TOKEN` where a score is no finite number (`masked`: -inf may be among them)."""
    isa = kernels_for(scores.device.type)
    if isa is not None:
        return library.choose(isa, scores.float(), library.pack_draws(draws), masked=masked)
    is_good = scores.amax(-1).isfinite() if masked else scores.sum(-1).isfinite()
    token_ids = scores.argmax(-1)
    drawn = [i for i, each in enumerate(draws) if each.temperature]
    if drawn:
        some = [draws[i] for i in drawn]
        token_ids[drawn] = _race(_filter(scores[drawn], some), _waits(some, scores.shape[-1]))
    found: list[int] = torch.where(is_good, token_ids, NO_TOKEN).tolist()
    return found


def _waits(draws: Sequence[Draw], vocab: int) -> Waits:
    stream = Stream(draws[0].stream)
    return exponentials([d.seed for d in draws], [d.position for d in draws], stream, vocab)


def most_probable(logits: torch.Tensor) -> list[int]:
    """The token with the largest of each row of `logits` [rows, vocab]; `NO_TOKEN` unless all are finite."""
    is_good = logits.sum(-1).isfinite()
    found: list[int] = torch.where(is_good, logits.argmax(-1), NO_TOKEN).tolist()
    return found


def process_logits(logits: torch.Tensor, states: Sequence[SamplingState]) -> torch.Tensor:
    """A copy with all parameters applied: the softmax of a row is what its token is drawn from.

    Greedy rows get bias, penalties and `min_tokens` only; their token is the argmax.
    """
    scores = _penalized(logits, states)
    drawn = [i for i, state in enumerate(states) if not state.params.is_greedy]
    if len(drawn) == len(states):
        return _filter(scores, [state.params for state in states])
    if drawn:
        scores[drawn] = _filter(scores[drawn], [states[i].params for i in drawn])
    return scores


def draw(scores: torch.Tensor, states: Sequence[SamplingState], stream: Stream) -> torch.Tensor:
    """Token ids `[rows]`, with the numbers that belong to each (seed, position)."""
    return _race(scores, _waits([state.draw(0, stream) for state in states], scores.shape[-1]))


def _race(scores: torch.Tensor, waits: Waits) -> torch.Tensor:
    """The token that comes first where each waits for `waits` [rows, vocab] over its probability."""
    return (scores.double().softmax(-1) / torch.from_numpy(waits).to(scores.device)).argmax(-1)


def _penalized(logits: torch.Tensor, states: Sequence[SamplingState]) -> torch.Tensor:
    """A copy with bias, penalties and `min_tokens` applied."""
    scores = logits.float().clone()
    for row, state in zip(scores, states, strict=True):
        if len(state.bias_ids):
            row[state.bias_ids] += state.biases
    counted = [i for i, state in enumerate(states) if state.output_counts is not None]
    if counted:
        scores[counted] = _less_of_the_same(scores[counted], [states[i] for i in counted])
    for row, state in zip(scores, states, strict=True):
        if state.position < state.params.min_tokens:
            row[state.stop_ids] = _NEVER
    return scores


def _less_of_the_same(scores: torch.Tensor, states: Sequence[SamplingState]) -> torch.Tensor:
    """Repetition, frequency and presence penalties, `scores` [states, vocab]."""
    params = [state.params for state in states]
    repetition, frequency, presence = (
        _column([getattr(each, name) for each in params], scores)
        for name in ("repetition_penalty", "frequency_penalty", "presence_penalty")
    )
    prompt = torch.stack([state.prompt_counts for state in states])  # type: ignore[misc]
    output = torch.stack([state.output_counts for state in states])  # type: ignore[misc]
    scaled = torch.where(scores < 0, scores * repetition, scores / repetition)
    scores = torch.where(prompt + output > 0, scaled, scores)
    return scores - frequency * output - presence * (output > 0)


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


def _filter(scores: torch.Tensor, params: Sequence[SamplingParams | Draw]) -> torch.Tensor:
    """Temperature, top-k, top-p and min-p; what falls out becomes -inf. Ties at the border of top-k stay."""
    scores = scores / _column([p.temperature for p in params], scores)
    vocab = scores.shape[-1]
    if any(0 < p.top_k < vocab for p in params):
        ks = [min(p.top_k, vocab) or vocab for p in params]
        best = scores.topk(max(k for k in ks if k < vocab), -1).values
        smallest = [best[i, k - 1].item() if k < vocab else _NEVER for i, k in enumerate(ks)]
        scores = scores.masked_fill(scores < _column(smallest, scores), _NEVER)
    if any(p.top_p < 1 for p in params):
        scores = _keep_top_p(scores, _column([p.top_p for p in params], scores))
    if any(p.min_p > 0 for p in params):
        probs = scores.softmax(-1)
        floor = _column([p.min_p for p in params], scores) * probs.amax(-1, keepdim=True)
        scores = scores.masked_fill(probs < floor, _NEVER)
    return scores


def _keep_top_p(scores: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Keep the smallest set of most probable tokens whose probability reaches `top_p`; at least one."""
    ascending, order = scores.sort(-1)
    drop = (ascending.softmax(-1).cumsum(-1) <= 1 - top_p) & (top_p < 1)
    drop[:, -1] = False
    return scores.masked_fill(torch.zeros_like(drop).scatter_(-1, order, drop), _NEVER)


def sampled_token(token_id: int, raw: torch.Tensor, state: SamplingState) -> SampledToken:
    """A chosen token with the logprobs the request asked for, from its row of raw logits `[vocab]`."""
    num_top = state.params.logprobs
    if num_top is None:
        return SampledToken(token_id)
    logprobs = raw.log_softmax(-1)
    values, ids = logprobs.topk(min(num_top, logprobs.shape[-1]))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return SampledToken(token_id, float(logprobs[token_id]), top)
