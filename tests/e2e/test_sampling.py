"""Every sampling parameter through the whole path, the first token from prefill included."""

from __future__ import annotations

import asyncio

import pytest
import pytest_asyncio
import torch

from tandem.tokenizer import Tokenizer
from tests.checkpoints import EOS, VOCAB_SIZE, tiny_llama
from tests.e2e.harness import ask, complete, generate, quiesce, stream
from tests.e2e.reference import greedy, greedy_with, logits, mixed_prompts

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = tuple(b"The quick brown fox")
NUM_TOKENS = 24


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def _nothing_left_behind(cluster):
    yield
    await quiesce(cluster)


async def sample(cluster, prompt=PROMPT, **sampling):
    return await complete(cluster, ask(prompt, **{"max_tokens": NUM_TOKENS, **sampling}))


# --- seeds ---


async def test_a_seed_gives_the_same_tokens_whatever_else_runs(cluster):
    wanted = {"temperature": 1.0, "top_p": 0.9, "top_k": 100, "seed": 7}
    alone = await sample(cluster, **wanted)
    crowd = [asyncio.create_task(sample(cluster, p, temperature=1.0)) for p in mixed_prompts(12, 90, seed=3)]
    among_others = await asyncio.gather(*(sample(cluster, **wanted) for _ in range(3)))
    await asyncio.gather(*crowd)

    assert [result.token_ids for result in among_others] == [alone.token_ids] * 3
    assert alone.token_ids != list(greedy(PROMPT, NUM_TOKENS)[0])


async def test_no_seed_gives_other_tokens_each_time(cluster):
    results = [await sample(cluster, temperature=1.5) for _ in range(3)]

    assert len({tuple(result.token_ids) for result in results}) == 3


async def test_several_completions_have_seeds_and_indices_of_their_own(cluster):
    message = ask(PROMPT, max_tokens=NUM_TOKENS, temperature=1.2, seed=40, n=4)
    streamed = await stream(cluster, message)
    unary = (await generate(cluster, message)).completions

    assert len({tuple(result.token_ids) for result in streamed}) == 4
    assert [completion.index for completion in unary] == [0, 1, 2, 3]
    assert [list(completion.token_ids) for completion in unary] == [r.token_ids for r in streamed]
    assert [result.finished.index for result in streamed] == [0, 1, 2, 3]
    assert streamed[0].token_ids == (await sample(cluster, temperature=1.2, seed=40)).token_ids
    assert len({result.admitted[0].request_id for result in streamed}) == 1


async def test_the_largest_seeds_work(cluster):
    for seed in (2**63 - 1, -(2**63), 0, -1):
        results = [await sample(cluster, temperature=1.0, seed=seed, max_tokens=6) for _ in range(2)]
        assert results[0].token_ids == results[1].token_ids


# --- ends ---


async def test_one_token_comes_from_prefill_alone(cluster):
    result = await sample(cluster, max_tokens=1)

    assert result.token_ids == [greedy(PROMPT, 1)[0][0]]
    assert result.reason == "LENGTH"
    assert result.finished.WhichOneof("matched_stop") is None


async def test_without_max_tokens_the_context_is_the_limit(cluster):
    result = await complete(cluster, ask("x" * 500, ignore_eos=True))

    assert len(result.token_ids) == 12
    assert result.reason == "LENGTH"


async def test_end_of_text_as_the_first_token(cluster):
    result = await sample(cluster, logit_bias={EOS: 100.0})

    assert result.token_ids == [EOS]
    assert result.text == ""
    assert result.reason == "STOP"
    assert result.finished.stop_token_id == EOS


async def test_end_of_text_waits_for_min_tokens(cluster):
    result = await sample(cluster, logit_bias={EOS: 100.0}, min_tokens=5)

    assert result.token_ids[5:] == [EOS]
    assert EOS not in result.token_ids[:5]
    assert result.token_ids[:5] == list(greedy(PROMPT, 5)[0])


async def test_end_of_text_can_be_ignored(cluster):
    result = await sample(cluster, logit_bias={EOS: 100.0}, ignore_eos=True)

    assert result.token_ids == [EOS] * NUM_TOKENS
    assert result.reason == "LENGTH"


@pytest.mark.parametrize("position", [0, 1, 7])
async def test_a_stop_token_ends_the_output_wherever_it_comes(cluster, position):
    plain = greedy(PROMPT, NUM_TOKENS)[0]
    token = plain[position]
    result = await sample(cluster, stop_token_ids=[token])

    assert result.token_ids == list(plain[: plain.index(token) + 1])
    assert result.reason == "STOP"
    assert result.finished.stop_token_id == token


def readable():
    """Bias that makes every output token one readable character, and the text varied."""
    ids = Tokenizer.from_dir(tiny_llama()).encode("abcdefghijklmnopqrstuvwxyz0123456789 .,:;!?")
    bias = dict.fromkeys(range(VOCAB_SIZE), -100.0) | dict.fromkeys(ids, 100.0)
    return {"logit_bias": bias, "presence_penalty": 2.0, "frequency_penalty": 2.0}


@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 2), (0, 6), (1, 1), (3, 4), (22, 2)])
async def test_a_stop_string_that_spans_tokens_is_cut_off(cluster, start, length):
    """Those that start at 0 span the token that prefill sampled and those of decode."""
    text = (await sample(cluster, "Say:", **readable())).text
    stop = text[start : start + length]
    result = await sample(cluster, "Say:", stop=["not in the text", stop + "~", stop], **readable())

    assert len(text) == NUM_TOKENS
    assert result.text == text[: text.index(stop)]
    assert len(result.token_ids) == text.index(stop) + length
    assert result.reason == "STOP"
    assert result.finished.stop_string == stop


async def test_what_looks_like_a_stop_string_and_is_none_comes_out_in_the_end(cluster):
    text = (await sample(cluster, "Say:", **readable())).text
    result = await sample(cluster, "Say:", stop=[text[-3:] + "~", text[4:9] + "~"], **readable())

    assert result.text == text
    assert result.reason == "LENGTH"


async def test_text_is_what_the_tokens_spell(cluster):
    tokenizer = Tokenizer.from_dir(tiny_llama())
    prompt = "naïve ✓ 日本"
    as_ids = await sample(cluster, tokenizer.encode(prompt), max_tokens=60, **readable())
    result = await complete(cluster, ask(prompt, max_tokens=60, **readable()))

    assert result.text == tokenizer.decode(result.token_ids) == as_ids.text
    assert result.token_ids == as_ids.token_ids


# --- logits ---


async def test_logprobs_are_those_of_the_model(cluster):
    result = await sample(cluster, logprobs=3, temperature=1.3, seed=5, presence_penalty=1.0)
    wanted = logits([*PROMPT, *result.token_ids])[len(PROMPT) - 1 : -1].log_softmax(-1)

    assert len(result.logprobs) == NUM_TOKENS
    for row, token, got in zip(wanted, result.token_ids, result.logprobs, strict=True):
        assert got.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [entry.logprob for entry in got.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


async def test_logprobs_may_be_of_the_chosen_token_only(cluster):
    chosen = await sample(cluster, logprobs=0)
    none = await sample(cluster)

    assert [len(entry.top) for entry in chosen.logprobs] == [0] * len(chosen.token_ids)
    assert none.logprobs == []
    assert {len(entry.top) for entry in (await sample(cluster, logprobs=20)).logprobs} == {20}


async def test_logit_bias_wins_and_bans(cluster):
    favourite = await sample(cluster, logit_bias={65: 100.0})
    first = greedy(PROMPT, 1)[0][0]
    banned = await sample(cluster, logit_bias={first: -100.0}, max_tokens=1)

    assert favourite.token_ids == [65] * NUM_TOKENS
    assert banned.token_ids == [int(logits(PROMPT)[-1].index_fill(0, torch.tensor(first), -1e9).argmax())]


async def test_penalties_equal_their_formulas(cluster):
    def repetition(row, output):
        seen = list({*PROMPT, *output})
        row[seen] = torch.where(row[seen] < 0, row[seen] * 1.7, row[seen] / 1.7)
        return row

    def count(row, output):
        counts = torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=VOCAB_SIZE)
        return row - 0.8 * (counts > 0) - 1.5 * counts

    plain = list(greedy(PROMPT, NUM_TOKENS)[0])
    repeated = (await sample(cluster, repetition_penalty=1.7)).token_ids
    counted = (await sample(cluster, presence_penalty=0.8, frequency_penalty=1.5)).token_ids

    assert repeated == greedy_with(PROMPT, NUM_TOKENS, repetition) != plain
    assert counted == greedy_with(PROMPT, NUM_TOKENS, count) != plain


async def test_filters_that_leave_one_token_are_greedy(cluster):
    plain = list(greedy(PROMPT, NUM_TOKENS)[0])

    for narrow in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        assert (await sample(cluster, temperature=1.0, **narrow)).token_ids == plain
