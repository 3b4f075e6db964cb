"""From chunks to first tokens: cutting a prompt changes nothing, and padding is counted."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from prefill_worker.job import PrefillJob
from prefill_worker.runner import Chunk, PrefillRunner
from tandem.engine.block_pool import BlockPool
from tandem.engine.cores import OwnCores
from tandem.engine.model_runner import ModelRunner
from tandem.engine.sampler import BadLogits, SampledToken
from tests.checkpoints import tiny_llama
from tests.serving import BLOCK_SIZE, NAN, Meddler, greedy, make_model, make_work, prompt_of

BUDGET = 1024


@pytest.fixture
def model():
    return make_model(64)


@pytest.fixture
def pool():
    return BlockPool("prefill", 64, BLOCK_SIZE)


def make_job(pool, name="r", length=100, **sampling) -> PrefillJob:
    job = PrefillJob(make_work(name, prompt_of(length, start=length), **sampling), lambda event: None)
    blocks = pool.allocate(name, length)
    assert blocks is not None
    job.blocks = blocks
    return job


def whole(*jobs) -> list[Chunk]:
    return [Chunk(job, job.num_left) for job in jobs]


@pytest.mark.parametrize("size", [1, 7, BLOCK_SIZE, 33, 99, 100])
def test_a_chunked_prompt_gives_the_same_first_token_and_logprobs(model, pool, size):
    runner = PrefillRunner(model, BUDGET)
    expected = runner.run(whole(make_job(pool, "whole", logprobs=20)))[0]
    job, found = make_job(pool, "chunked", logprobs=20), []
    while job.num_left:
        found += runner.run([Chunk(job, min(size, job.num_left))])
    assert found[:-1] == [None] * (-(-100 // size) - 1)
    assert found[-1] == expected
    assert isinstance(expected, SampledToken)
    assert (expected.token_id,) == greedy(job.work.token_ids, 1)
    assert len(expected.top) == 20


def test_a_prompt_gives_the_same_in_company_as_alone(model, pool):
    runner = PrefillRunner(model, BUDGET)
    lengths = [64, 61, 50, 17, 3, 1]
    alone = [runner.run(whole(make_job(pool, f"a{n}", n, logprobs=5)))[0] for n in lengths]
    together = runner.run(whole(*(make_job(pool, f"b{n}", n, logprobs=5) for n in lengths)))
    assert together == alone


def test_only_complete_prompts_get_a_token_each_its_own(model, pool):
    runner = PrefillRunner(model, BUDGET)
    jobs = [make_job(pool, "a", 40), make_job(pool, "b", 50), make_job(pool, "c", 30)]
    found = runner.run([Chunk(jobs[0], 40), Chunk(jobs[1], 20), Chunk(jobs[2], 30)])
    assert [token and (token.token_id,) for token in found] == [
        greedy(jobs[0].work.token_ids, 1),
        None,
        greedy(jobs[2].work.token_ids, 1),
    ]
    assert [job.num_computed for job in jobs] == [40, 20, 30]


def test_a_resumed_request_continues_where_it_was(model, pool):
    prompt, delivered = prompt_of(30), greedy(prompt_of(30), 3)
    job = PrefillJob(make_work("r", prompt, delivered=delivered), lambda event: None)
    job.blocks = pool.allocate("r", job.num_tokens)
    (token,) = PrefillRunner(model, BUDGET).run(whole(job))
    assert token.token_id == greedy(prompt, 4)[-1]


def test_padding_is_counted(pool):
    """Torch's attention pads prompts of similar length; the kernels of ours do not."""
    lean = ModelRunner.load(tiny_llama(), num_blocks=64, block_size=BLOCK_SIZE, implementation="lean")
    runner = PrefillRunner(lean, BUDGET)
    runner.run(whole(make_job(pool, "a", 40), make_job(pool, "b", 32), make_job(pool, "c", 40)))
    assert (runner.stats.num_batches, runner.stats.num_prompts) == (1, 3)
    assert (runner.stats.num_tokens, runner.stats.num_padded_rows) == (112, 8)


def test_a_row_without_usable_logits_spoils_only_itself(model, pool):
    def spoil(forward, batch):
        logits = forward(batch).clone()
        logits[1, 5] = NAN
        return logits

    jobs = [make_job(pool, name, 20) for name in "abc"]
    found = PrefillRunner(Meddler(model, forward=spoil), BUDGET).run(whole(*jobs))
    assert [type(token) for token in found] == [SampledToken, BadLogits, SampledToken]


def test_what_a_token_costs_is_learnt_for_each_number_of_cores(model, pool, monkeypatch):
    cores = OwnCores(2)
    runner = PrefillRunner(model, 1024, cores=cores)
    clock = iter((0.0, 2.0, 10.0, 14.0))  # two seconds with two cores, four with one
    monkeypatch.setattr("prefill_worker.runner.time", SimpleNamespace(monotonic=lambda: next(clock)))
    for name, num_cores in (("two", 2), ("one", 1)):
        cores.num_cores = num_cores
        runner.run(whole(make_job(pool, name, 40)))
        assert runner.cost.per_token_s == pytest.approx(0.1 / num_cores)
    runner.cost.num_cores = 2
    assert runner.cost.per_token_s == pytest.approx(0.05)
