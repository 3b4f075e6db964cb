"""Acceptance keeps exactly what the target allows, and speculative sampling has the target's distribution."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decode_worker.acceptance import draw, is_accepted, match, point, residual
from tandem.engine.rng import Stream, exponentials

VOCAB = 8
DRAWS = 20_000
# Upper 1e-5 quantile of chi-square with 7 degrees of freedom: one false alarm in 100,000 runs of one case.
CHI_SQUARE_LIMIT = 35.26


def distribution(rng: np.random.Generator, zeros: int = 0) -> np.ndarray:
    probs = rng.dirichlet(np.full(VOCAB, 0.7))
    probs[rng.permutation(VOCAB)[:zeros]] = 0.0
    return probs / probs.sum()


def drawn(probs: np.ndarray, rng: np.random.Generator) -> int:
    return draw(probs, rng.exponential(size=VOCAB))


def speculate(draft_probs: np.ndarray, target_probs: np.ndarray, rng: np.random.Generator) -> int:
    """One position of speculative sampling."""
    draft_id = drawn(draft_probs, rng)
    if is_accepted(draft_id, draft_probs, target_probs, rng.random()):
        return draft_id
    return drawn(residual(draft_probs, target_probs), rng)


@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=9))
def test_match_is_the_common_beginning(draft: list[int], target: list[int]) -> None:
    length = match(draft, target)
    assert draft[:length] == target[:length]
    assert length in (len(draft), len(target)) or draft[length] != target[length]


@pytest.mark.parametrize("zeros", [0, 3])
@pytest.mark.parametrize("seed", range(4))
def test_distribution_is_the_targets(seed: int, zeros: int) -> None:
    rng = np.random.default_rng(seed)
    draft_probs, target_probs = distribution(rng, zeros), distribution(rng, zeros)
    counts = np.bincount([speculate(draft_probs, target_probs, rng) for _ in range(DRAWS)], minlength=VOCAB)
    assert not counts[target_probs == 0].any()
    possible = target_probs > 0
    expected = DRAWS * target_probs[possible]
    assert (((counts[possible] - expected) ** 2) / expected).sum() < CHI_SQUARE_LIMIT


def test_the_check_notices_a_draft_that_is_simply_believed() -> None:
    rng = np.random.default_rng(1)
    draft_probs, target_probs = distribution(rng), distribution(rng)
    counts = np.bincount([drawn(draft_probs, rng) for _ in range(DRAWS)], minlength=VOCAB)
    expected = DRAWS * target_probs
    assert (((counts - expected) ** 2) / expected).sum() > CHI_SQUARE_LIMIT


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=200)
def test_residual_is_a_distribution_even_when_nothing_is_left(seed: int) -> None:
    rng = np.random.default_rng(seed)
    target_probs = distribution(rng)
    for draft_probs in (distribution(rng), target_probs, target_probs * (1 + 1e-15), np.full(VOCAB, np.nan)):
        rest = residual(draft_probs, target_probs)
        assert np.isfinite(rest).all()
        assert rest.sum() == pytest.approx(1.0)


def test_impossible_and_unusable_draft_tokens_are_rejected() -> None:
    target_probs = np.full(VOCAB, 1 / VOCAB)
    assert not is_accepted(3, point(2, target_probs), target_probs, 0.0)
    assert not is_accepted(3, np.full(VOCAB, np.nan), target_probs, 0.0)
    assert is_accepted(2, point(2, target_probs), target_probs, 0.1)
    assert not is_accepted(2, point(2, target_probs), target_probs, 0.5)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_draw_never_returns_an_impossible_token(seed: int, position: int) -> None:
    probs = distribution(np.random.default_rng(seed), zeros=5)
    assert probs[draw(probs, exponentials([seed], [position], Stream.TOKEN, VOCAB)[0])] > 0
