"""Parameters against transformers' own processors, draws against the exact distribution."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from tandem.engine import sampler
from tandem.engine.rng import Stream, exponentials, uniforms
from tandem.engine.sampler import (
    NO_TOKEN,
    BadLogits,
    SampledToken,
    Sampler,
    choose,
    most_probable,
    process_logits,
)
from tandem.engine.sampling_state import SamplingState
from tandem.sampling import SamplingParams

VOCAB = 50
EOS = 7


def logits(rows=4, seed=0, vocab=VOCAB):
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def state(seed=0, prompt=(1, 2, 2, 3), output=(), vocab=VOCAB, **params):
    params = {"temperature": 1.0} | params
    return SamplingState(SamplingParams(**params), seed, prompt, vocab, [EOS], output)


def processed(raw, **params):
    return process_logits(raw, [state(**params) for _ in raw])


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("params", "processor"),
    [
        ({"temperature": 0.7}, hf.TemperatureLogitsWarper(0.7)),
        ({"top_k": 5}, hf.TopKLogitsWarper(5)),
        ({"top_k": 500}, hf.TopKLogitsWarper(500)),
        ({"top_p": 0.8}, hf.TopPLogitsWarper(0.8)),
        ({"top_p": 1e-6}, hf.TopPLogitsWarper(1e-6)),
        ({"min_p": 0.2}, hf.MinPLogitsWarper(0.2)),
        ({"min_p": 1.0}, hf.MinPLogitsWarper(1.0)),
        ({"repetition_penalty": 1.3}, hf.RepetitionPenaltyLogitsProcessor(1.3)),
        ({"min_tokens": 3}, hf.MinNewTokensLengthLogitsProcessor(4, 3, EOS)),
    ],
)
def test_equals_transformers(params, processor):
    raw = logits(seed=3)
    history = torch.tensor([[1, 2, 2, 3, 9, 9]] * 4)
    expected = processor(history, raw.clone())
    assert_same(processed(raw, output=(9, 9), **params), expected)


def test_all_filters_in_order():
    raw = logits(seed=4)
    chain = hf.LogitsProcessorList(
        [
            hf.RepetitionPenaltyLogitsProcessor(1.2),
            hf.TemperatureLogitsWarper(1.5),
            hf.TopKLogitsWarper(20),
            hf.TopPLogitsWarper(0.9),
            hf.MinPLogitsWarper(0.05),
        ]
    )
    expected = chain(torch.tensor([[1, 2, 2, 3]] * 4), raw.clone())
    actual = processed(raw, repetition_penalty=1.2, temperature=1.5, top_k=20, top_p=0.9, min_p=0.05)
    assert_same(actual, expected)


def test_ties_at_the_border_of_top_k_stay():
    raw = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    kept = process_logits(raw, [state(prompt=(1,), vocab=5, top_k=2)]).isfinite()
    assert kept.tolist() == [[False, True, True, True, False]]


def test_openai_penalties_count_the_output_only():
    raw = logits(1)
    actual = processed(raw, output=(4, 4, 5), presence_penalty=0.5, frequency_penalty=0.25, logit_bias={2: 3})
    expected = raw.clone()
    expected[0, 4] -= 0.5 + 2 * 0.25
    expected[0, 5] -= 0.5 + 0.25
    expected[0, 2] += 3
    assert_same(actual, expected)


def test_min_tokens_hides_stop_tokens_until_then():
    hidden = processed(logits(1), output=(4,), min_tokens=2, stop_token_ids=(11,))
    assert (~hidden[0].isfinite()).nonzero().flatten().tolist() == [EOS, 11]
    assert processed(logits(1), output=(4, 4), min_tokens=2, stop_token_ids=(11,)).isfinite().all()


def test_rollback_leaves_no_trace():
    params = {"repetition_penalty": 1.5, "frequency_penalty": 1.0}
    walked, fresh = state(output=(3, 4), **params), state(output=(3, 4), **params)
    for token_id in (5, 5, 6):
        walked.append(token_id)
    walked.rollback(3)
    raw = logits(1)
    assert walked.position == fresh.position
    assert torch.equal(process_logits(raw, [walked]), process_logits(raw, [fresh]))


def test_greedy_takes_the_lowest_of_equals():
    raw = torch.zeros(2, VOCAB)
    raw[0, [9, 30, 41]] = 2.0
    greedy = [state(temperature=0.0), state(temperature=0.0)]
    assert Sampler().sample(raw, greedy) == [SampledToken(9), SampledToken(0)]


def test_greedy_with_penalties():
    raw = torch.zeros(1, VOCAB)
    raw[0, 9], raw[0, 4] = 2.0, 1.9
    assert Sampler().sample(raw, [state(temperature=0.0, output=(9,), presence_penalty=1.0)]) == [
        SampledToken(4)
    ]


def test_logprobs_are_of_the_raw_distribution():
    raw = logits(2, seed=5)
    result = Sampler().sample(raw, [state(logprobs=3, temperature=0.5, top_k=1), state(logprobs=0)])
    expected = raw.log_softmax(-1)
    assert result[0].logprob == pytest.approx(expected[0].max().item())
    assert [token for token, _ in result[0].top] == expected[0].topk(3).indices.tolist()
    assert result[1].top == ()
    assert result[1].logprob == pytest.approx(expected[1, result[1].token_id].item())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bad_logits_fail_their_row_only(bad, temperature):
    raw = logits(3)
    raw[1, 13] = bad
    result = Sampler().sample(raw, [state(temperature=temperature) for _ in range(3)])
    assert [isinstance(r, BadLogits) for r in result] == [False, True, False]


def test_a_row_with_nothing_left_is_bad():
    only = state(prompt=(0,), vocab=8, min_tokens=1, stop_token_ids=tuple(range(8)))
    assert Sampler().sample(logits(1, vocab=8), [only]) == [BadLogits()]


def test_no_rows():
    assert Sampler().sample(logits(0), []) == []


PARAMS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 1, 7]),
        "top_p": st.sampled_from([1.0, 0.6]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "repetition_penalty": st.sampled_from([1.0, 1.4]),
        "frequency_penalty": st.sampled_from([0.0, -1.0]),
        "logprobs": st.sampled_from([None, 2]),
    }
)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(PARAMS, st.integers(-(2**63), 2**63 - 1)), min_size=1, max_size=6))
def test_a_row_does_not_depend_on_its_batch(rows):
    raw = logits(len(rows), seed=len(rows))
    states = [state(seed=seed, output=(5, 5, 8), **params) for params, seed in rows]
    together = Sampler().sample(raw, states)
    assert together == [Sampler().sample(raw[i : i + 1], [s])[0] for i, s in enumerate(states)]


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.5, "top_p": 0.9}, {"top_k": 4, "frequency_penalty": 0.7}, {"min_p": 0.1}],
)
def test_frequencies_match_the_distribution(params):
    """Chi-square over 8 000 seeds. They are fixed; with fresh ones a false alarm has probability 1e-5."""
    draws, vocab = 8_000, 12
    raw = logits(1, seed=8, vocab=vocab) / 2
    one = state(prompt=(1, 2), vocab=vocab, output=(3,), **params)
    probs = process_logits(raw, [one]).double().softmax(-1)[0].numpy()
    batch = [state(seed=i, prompt=(1, 2), vocab=vocab, output=(3,), **params) for i in range(draws)]
    sampled = Sampler().sample(raw.expand(draws, vocab), batch)
    counts = np.bincount([s.token_id for s in sampled], minlength=vocab)
    possible = probs > 0
    assert not counts[~possible].any()
    expected = draws * probs[possible]
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    assert statistic < 45  # P(chi-square with at most 11 degrees of freedom ≥ 45) < 1e-5


@pytest.mark.parametrize("vocab", [12, 50, 1003])
@pytest.mark.parametrize("temperature", [0.3, 1.0])
@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.9, "min_p": 0.02}]
)
def test_kernels_draw_what_torch_draws(monkeypatch, vocab, temperature, filters):
    """Fixed numbers: where a chance falls on a border to the last bit, the two may differ."""
    raw = logits(400, seed=vocab, vocab=vocab)
    draws = [state(seed=7 * i, vocab=vocab, temperature=temperature, **filters).draw(i) for i in range(400)]
    assert sampler.kernels_for("cpu") is not None
    by_kernels = choose(raw, draws)
    monkeypatch.setattr(sampler, "kernels_for", lambda device: None)
    assert choose(raw, draws) == by_kernels
    assert len(set(by_kernels)) > 5


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-60])
def test_a_tiny_temperature_is_greedy(temperature):
    raw = logits(20)
    draws = [state(seed=i, temperature=temperature).draw() for i in range(20)]
    assert choose(raw, draws) == most_probable(raw)


@pytest.mark.parametrize("has_kernels", [True, False])
def test_what_is_no_number_is_not_drawn(monkeypatch, has_kernels):
    if not has_kernels:
        monkeypatch.setattr(sampler, "kernels_for", lambda device: None)
    raw = logits(6)
    raw[1, 3], raw[2, 3], raw[3, 3], raw[4] = float("nan"), float("inf"), float("-inf"), float("-inf")
    for temperature in (0.0, 1.0):
        draws = [state(temperature=temperature).draw() for _ in raw]
        bad = [token_id == NO_TOKEN for token_id in choose(raw, draws)]
        assert bad == [False, True, True, True, True, False]
        bad = [token_id == NO_TOKEN for token_id in choose(raw[3:], draws[3:], masked=True)]
        assert bad == [False, True, False]


def test_uniforms_depend_on_seed_position_and_stream_only():
    seeds, positions = [3, -3, 2**63 - 1, 0], [0, 1, 2, 10**6]
    together = uniforms(seeds, positions)
    assert together.tolist() == [uniforms([s], [p]).item() for s, p in zip(seeds, positions, strict=True)]
    streams = [uniforms(seeds, positions, stream).tolist() for stream in Stream]
    assert len({value for row in streams for value in row}) == len(Stream) * len(seeds)


@pytest.mark.parametrize("vary", ["seed", "position"])
def test_uniforms_are_uniform_and_uncorrelated(vary):
    """200 bins of 100 000 numbers; chi-square of 199 degrees exceeds 300 with probability below 1e-5."""
    index, fixed = list(range(100_000)), [42] * 100_000
    numbers = uniforms(index, fixed) if vary == "seed" else uniforms(fixed, index)
    assert (numbers >= 0).all()
    assert (numbers < 1).all()
    counts = np.bincount((200 * numbers).astype(int), minlength=200)
    assert ((counts - 500) ** 2 / 500).sum() < 300
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.02  # 6 standard deviations


@pytest.mark.parametrize("vary", ["seed", "position"])
def test_the_first_to_arrive_is_drawn_with_its_probability(vary):
    """Chi-square of 5 degrees exceeds 32 with probability below 1e-5."""
    probs = np.array([0.4, 0.3, 0.15, 0.1, 0.04, 0.01])
    index, fixed = list(range(50_000)), [7] * 50_000
    keys = (index, fixed) if vary == "seed" else (fixed, index)
    waits = exponentials(*keys, Stream.DRAFT, len(probs))
    assert (waits > 0).all()
    assert np.isfinite(waits).all()
    counts = np.bincount((waits / probs).argmin(-1), minlength=len(probs))
    assert ((counts - 50_000 * probs) ** 2 / (50_000 * probs)).sum() < 32
    assert abs(np.corrcoef(waits.T)[np.triu_indices(len(probs), 1)]).max() < 0.03  # 6 standard deviations


def test_waits_depend_on_seed_position_and_stream_only():
    both = exponentials([5, -5], [1, 2], Stream.TOKEN, 9)
    assert both[1].tolist() == exponentials([-5], [2], Stream.TOKEN, 9)[0].tolist()
    assert both[0, :4].tolist() == exponentials([5], [1], Stream.TOKEN, 4)[0].tolist()
    streams = [exponentials([5], [1], stream, 9).tolist()[0] for stream in Stream]
    assert len({value for row in streams for value in row}) == len(Stream) * 9


@pytest.mark.parametrize("has_kernels", [True, False])
def test_similar_distributions_mostly_draw_the_same_token(monkeypatch, has_kernels):
    """At least as often as Daliri et al. promise; four standard deviations are allowed for."""
    if not has_kernels:
        monkeypatch.setattr(sampler, "kernels_for", lambda device: None)
    raw = 2 * logits(1).expand(4000, -1)
    other = raw + 0.4 * logits(4000)
    draws = [state(seed=i, temperature=1.0).draw() for i in range(4000)]
    same = np.mean([a == b for a, b in zip(choose(raw, draws), choose(other, draws), strict=True)])
    distance = (raw.softmax(-1) - other.softmax(-1)).abs().sum(-1) / 2
    promised = ((1 - distance) / (1 + distance)).mean().item()
    assert promised - 4 * 0.5 / 4000**0.5 < same < 1 - distance.mean().item() + 4 * 0.5 / 4000**0.5
