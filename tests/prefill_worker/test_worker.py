"""A prompt's life on a prefill worker: every way it can end, and that nothing is owned afterwards."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from kvstore.objects import ObjectState
from prefill_worker import runner
from prefill_worker.job import PrefillJob
from tandem.engine.batch import SequenceRows
from tandem.engine.paged_cache import PagedCache
from tandem.errors import AlreadyExists, InvalidRequest, TandemError, Unavailable
from tandem.output import OutputDelta
from tandem.request import FinishReason
from tests.prefill_worker.rig import Rig, prefilling
from tests.serving import (
    BLOCK_SIZE,
    NAN,
    BatchGate,
    Gate,
    Meddler,
    greedy,
    make_model,
    make_work,
    prompt_of,
    tokenizer,
    until,
)

LONG = {"token_budget": 32, "max_wait_s": 0.0}  # a prompt of 100 tokens takes four chunks


def take_all(rig: Rig, but: int = 0) -> None:
    """Somebody else owns the pool."""
    assert rig.pool.allocate("somebody", (rig.pool.num_free - but) * BLOCK_SIZE)


async def give_back(rig: Rig) -> None:
    """What `take_all` took is free again, and somebody says so, as the end of a hand-off does."""
    rig.pool.release("somebody")
    with rig.worker._wake:
        rig.worker._wake.notify()


# --- success --------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("config", [{}, LONG], ids=["whole", "chunked"])
async def test_a_prompt_gives_its_first_token_and_its_kv(length, config):
    prompt = prompt_of(length)
    async with prefilling(chunk_bytes=10_000, **config) as rig:
        sent = rig.submit(token_ids=prompt)
        delta = await sent.token()
        assert delta.token_ids == greedy(prompt, 1)
        assert delta.finish is None
        handle = await sent.handle()
        assert (handle.num_tokens, handle.fingerprint) == (length, sent.work.fingerprint)
        restored = PagedCache(rig.model.geometry, 8, BLOCK_SIZE)
        async for chunk, payload in rig.running.client.get(handle, "reader"):
            blocks = range(chunk.block_start, chunk.block_start + chunk.num_blocks)
            restored.write_blocks(list(blocks), payload, chunk.layer_start, chunk.num_layers)
        reference = make_model(8)
        reference.forward(reference.batch([rows_of(prompt)]))
        num_blocks = -(-length // BLOCK_SIZE)
        assert restored.read_blocks(range(num_blocks)).equal(reference.cache.read_blocks(range(num_blocks)))
        await rig.running.client.release(handle)
        assert rig.store.audit().is_empty


def rows_of(prompt) -> SequenceRows:
    return SequenceRows(prompt, 0, range(-(-len(prompt) // BLOCK_SIZE)))


async def test_logprobs_are_reported_only_if_asked_for():
    async with prefilling() as rig:
        first, second = rig.submit("a", logprobs=3), rig.submit("b")
        (entry,) = (await first.token()).logprobs
        assert len(entry.top) == 3
        assert (await second.token()).logprobs == ()
        await rig.running.client.release(await first.handle())
        await rig.running.client.release(await second.handle())


@pytest.mark.parametrize("config", [{}, LONG], ids=["whole", "chunked"])
@pytest.mark.parametrize("how", ["stop", "length"])
async def test_a_prompt_that_ends_with_its_first_token_puts_no_kv(config, how):
    prompt = prompt_of(100)
    (token,) = greedy(prompt, 1)
    sampling = {"stop_token_ids": (token,)} if how == "stop" else {"max_tokens": 1}
    async with prefilling(**config) as rig:
        sent = rig.submit(token_ids=prompt, **sampling)
        delta = await sent.token()
        assert (delta.token_ids, delta.finish) == ((token,), FinishReason(how))
        await until(lambda: rig.worker.num_running == 0)
        await rig.running.freed()
        assert rig.store.counters.sealed == 0
        may_be_known = how == "length" and not config  # that the first token is the last
        assert rig.store.counters.reserved == (0 if may_be_known else rig.store.counters.freed)
        assert sent.is_silent


async def test_a_burst_of_prompts_is_computed_in_one_batch():
    gate = Gate()
    async with prefilling(forward=gate) as rig:
        first = rig.submit("first")
        await until(lambda: gate.entered == 1)
        prompts = [rig.submit(f"r{i}", prompt_of(40, start=i)) for i in range(10)]
        gate.open()
        await rig.completes(first)
        for index, prompt in enumerate(prompts):
            assert await rig.completes(prompt) == greedy(prompt_of(40, start=index), 1)
        assert rig.worker.stats.num_batches == 2
        assert rig.worker.stats.num_prompts == 11
        assert rig.worker.stats.queue_s > 0


@pytest.mark.parametrize(
    ("patience", "expected"), [(1e6, [32, 20, 32, 8, 32, 3, 4]), (1e-6, [32, 32, 32, 4, 20, 8, 3])]
)
async def test_a_long_prompt_takes_turns_with_short_ones_until_it_is_late(patience, expected, monkeypatch):
    monkeypatch.setattr("tandem.token_cost.PATIENCE", patience)
    gate = BatchGate()
    async with prefilling(forward=gate, **LONG) as rig:
        long = rig.submit("long", prompt_of(100))
        await until(lambda: gate.entered == 1)
        shorts = [rig.submit(f"s{i}", prompt_of(length)) for i, length in enumerate((20, 8, 3))]
        gate.open()
        for prompt in (*shorts, long):
            await rig.completes(prompt)
        assert gate.sizes == expected


async def test_a_slow_machine_takes_prompts_in_smaller_pieces(monkeypatch):
    """So that a short prompt that comes meanwhile does not wait for all of a long one."""
    monkeypatch.setattr(runner, "LEAST_TOKENS", 40)
    gate = BatchGate()
    gate.let()
    async with prefilling(forward=gate, max_wait_s=0.0) as rig:
        await rig.completes(rig.submit("first", prompt_of(100)))  # nothing is known of it before
        rig.worker._runner.cost.observe(1000, 1000 * runner.CHUNK_S / 50)
        long = rig.submit("long", prompt_of(100))
        await until(lambda: gate.entered == 2)
        short = rig.submit("short", prompt_of(8))
        gate.open()
        assert await rig.completes(short) == greedy(prompt_of(8), 1)
        assert await rig.completes(long) == greedy(prompt_of(100), 1)
    assert (gate.sizes[0], gate.sizes[2], sum(gate.sizes)) == (100, 8, 208)
    assert 40 <= gate.sizes[1] <= 60


async def test_two_long_prompts_share_the_worker_with_a_short_one():
    gate = Gate()
    async with prefilling(forward=gate, **LONG) as rig:
        prompts = [rig.submit(f"l{i}", prompt_of(100, start=i)) for i in range(2)]
        await until(lambda: gate.entered == 1)
        prompts.append(rig.submit("short", prompt_of(8)))
        gate.open()
        for prompt in prompts:
            assert await rig.completes(prompt) == greedy(prompt.work.token_ids, 1)


# --- memory ---------------------------------------------------------------------------------------


async def test_prompts_that_need_the_whole_pool_go_one_after_the_other():
    async with prefilling(num_blocks=4) as rig:
        prompts = [rig.submit(f"r{i}", prompt_of(60, start=i)) for i in range(5)]
        for prompt in prompts:
            assert await rig.completes(prompt) == greedy(prompt.work.token_ids, 1)


async def test_a_prompt_without_memory_stops_nobody():
    async with prefilling(num_blocks=10) as rig:
        take_all(rig, but=2)
        large = rig.submit("large", prompt_of(100))
        small = rig.submit("small", prompt_of(20))
        await rig.completes(small)
        assert large.is_silent
        assert rig.worker.num_waiting == 1
        await give_back(rig)
        await rig.completes(large)


async def test_waiting_for_memory_costs_no_computing():
    async with prefilling(num_blocks=4) as rig:
        take_all(rig)
        rig.submit("a")
        before_s = time.process_time()
        await asyncio.sleep(0.2)
        assert time.process_time() - before_s < 0.1
        await give_back(rig)
        await until(lambda: rig.store.counters.sealed == 1)


async def test_what_can_never_fit_is_refused_at_once():
    async with prefilling(num_blocks=4) as rig:
        with pytest.raises(InvalidRequest) as caught:
            rig.submit(token_ids=prompt_of(65))
        assert caught.value.reason == "NEVER_FITS"
        assert caught.value.message == "prompt needs 5 KV blocks; the worker has 4"
        await rig.completes(rig.submit(token_ids=prompt_of(64)))


@pytest.mark.parametrize(
    "options",
    [
        {"token_ids": [1, 257]},
        {"token_ids": [1], "delivered": [9999]},
        {"token_ids": [1], "logit_bias": {257: 1.0}},
        {"token_ids": [1], "stop_token_ids": (257,)},
    ],
)
async def test_an_unknown_token_id_fails_only_its_own_prompt(options):
    async with prefilling() as rig:
        good = rig.submit("good")
        with pytest.raises(InvalidRequest) as caught:
            rig.submit("bad", **options)
        assert caught.value.reason == "BAD_PARAM"
        await rig.completes(good)


async def test_the_same_attempt_twice_is_refused_and_the_first_goes_on():
    gate, held = Gate(), Held()
    async with prefilling(forward=gate, client={"put": held.put}) as rig:
        first = rig.submit("r")
        await until(lambda: gate.entered == 1)
        second = rig.submit("r")
        gate.open()
        error = await second.error()
        assert isinstance(error, AlreadyExists)
        held.may_go.set()
        await rig.completes(first)


# --- cancellation and deadlines -------------------------------------------------------------------


async def test_cancelled_while_waiting():
    async with prefilling(num_blocks=4) as rig:
        take_all(rig)
        prompt = rig.submit()
        await until(lambda: rig.worker.num_waiting == 1)
        rig.worker.cancel(prompt.job)
        await until(lambda: rig.worker.num_waiting == 0)
        assert prompt.is_silent
        rig.pool.release("somebody")


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 4])
async def test_cancelled_between_chunks(num_chunks):
    gate = Gate()
    async with prefilling(forward=gate, **LONG) as rig:
        prompt = rig.submit(token_ids=prompt_of(100))
        for chunk in range(1, num_chunks):
            await until(lambda chunk=chunk: gate.entered == chunk)
            gate.let()
        await until(lambda: gate.entered == num_chunks)
        rig.worker.cancel(prompt.job)
        gate.let()
        await until(lambda: rig.pool.audit().is_empty)
        await rig.running.freed()
        assert prompt.is_silent
        assert gate.entered == num_chunks, "nothing more is computed for it"
        assert rig.store.counters.sealed == 0


async def test_cancelled_during_the_hand_off():
    held = Held()
    async with prefilling(client={"put": held.put}) as rig:
        prompt = rig.submit(token_ids=prompt_of(100))
        await prompt.token()
        await held.entered.wait()
        rig.worker.cancel(prompt.job)
        await asyncio.sleep(0.02)
        assert rig.pool.num_free < rig.pool.num_blocks, "the put still reads the blocks"
        held.may_go.set()
        await until(lambda: rig.pool.audit().is_empty)
        await rig.running.freed()
        assert prompt.is_silent


async def test_cancelled_after_the_seal_releases_what_is_stored():
    async with prefilling() as rig:
        prompt = rig.submit()
        await prompt.token()
        await prompt.handle()
        assert rig.store.audit().owned
        rig.worker.cancel(prompt.job)
        await rig.running.freed()


async def test_cancelling_twice_or_too_late_is_harmless():
    async with prefilling() as rig:
        prompt = rig.submit()
        await rig.completes(prompt)
        for _ in range(2):
            rig.worker.cancel(prompt.job)
        await rig.completes(rig.submit("next"))


async def test_the_deadline_ends_a_prompt_that_waits():
    async with prefilling(num_blocks=4) as rig:
        take_all(rig)
        prompt = rig.submit(timeout_s=0.05)
        assert (await prompt.error()).reason == "DEADLINE_PREFILL"
        await until(lambda: rig.worker.num_waiting == 0)
        rig.pool.release("somebody")


async def test_the_deadline_ends_a_prompt_between_chunks():
    gate = Gate()
    async with prefilling(forward=gate, **LONG) as rig:
        prompt = rig.submit(token_ids=prompt_of(100), timeout_s=1.0)
        await until(lambda: gate.entered == 1)
        await asyncio.sleep(prompt.work.time_left_s() + 0.01)
        gate.let()
        assert (await prompt.error()).reason == "DEADLINE_PREFILL"
        await until(lambda: rig.pool.audit().is_empty)
        assert gate.entered == 1
        await rig.running.freed()


async def test_where_forwards_have_all_cores_kv_leaves_between_them():
    """The object is reserved and its reader told while the first chunk is computed; nothing is sent."""

    def num_messages() -> int:
        [obj] = rig.store._books.objects.values()
        assert obj.state is ObjectState.RESERVED
        return len(obj.digests)

    gate = Gate()
    async with prefilling(forward=gate, is_beside=False, chunk_bytes=32 * 256, **LONG) as rig:
        prompt = rig.submit(token_ids=prompt_of(100))
        for number in range(4):  # chunks of 32 tokens, a message for each of two layers
            await until(lambda: gate.entered > number and rig.store._books.objects)  # noqa: B023 (in this turn)
            rig.model.cache.layers_written = rig.model.geometry.num_layers  # as the kernels would say
            await until(lambda: num_messages() == 2 * number)  # noqa: B023
            await asyncio.sleep(0.02)
            assert num_messages() == 2 * number
            gate.let()
        await rig.completes(prompt)
        assert prompt.opened is not None


async def test_only_prompts_with_much_kv_open_their_way_before_they_are_computed(monkeypatch):
    monkeypatch.setattr("tests.prefill_worker.rig.OVERLAP_BYTES", 16 * 512)  # what 16 tokens have
    gate = Gate()
    async with prefilling(forward=gate, is_beside=False) as rig:
        prompt = rig.submit(token_ids=prompt_of(15))
        await until(lambda: gate.entered == 1)
        await asyncio.sleep(0.02)
        assert not rig.store.audit().owned
        gate.let()
        await rig.completes(prompt)
        assert prompt.opened is None


class Held:
    """Holds each put before its first chunk."""

    def __init__(self) -> None:
        self.entered, self.may_go = asyncio.Event(), asyncio.Event()

    def put(self, make, header):
        writer = make(header)
        write = writer.write

        async def held(where, payload):
            self.entered.set()
            await self.may_go.wait()
            await write(where, payload)

        writer.write = held
        return writer


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (RuntimeError("secret"), "BUG"),
        (MemoryError(), "NO_MEMORY_FIT_NOW"),
        (RuntimeError("DefaultCPUAllocator: can't allocate: out of memory"), "NO_MEMORY_FIT_NOW"),
    ],
)
async def test_a_forward_that_raises_fails_only_its_prompts(fault, reason):
    gate, raised = Gate(), []

    def forward(call, batch):
        result = gate(call, batch)
        if gate.entered == 2:
            raised.append(fault)
            raise fault
        return result

    async with prefilling(forward=forward) as rig:
        first = rig.submit("first")
        await until(lambda: gate.entered == 1)
        batch = [rig.submit(f"r{i}", prompt_of(40)) for i in range(3)]
        gate.open()
        errors = [await prompt.error() for prompt in batch]
        assert [error.reason for error in errors] == [reason] * 3
        assert all("secret" not in str(error) for error in errors)
        assert (errors[0].retry_after_ms is not None) == (reason == "NO_MEMORY_FIT_NOW")
        await rig.completes(first)
        await rig.completes(rig.submit("after"))
        assert all(prompt.is_silent for prompt in batch)


async def test_a_forward_that_raises_in_a_later_chunk_frees_what_was_sent():
    def forward(call, batch):
        if batch.num_positions > 64:
            raise RuntimeError("later")
        return call(batch)

    async with prefilling(forward=forward, **LONG) as rig:
        assert (await rig.submit(token_ids=prompt_of(100)).error()).reason == "BUG"
        await until(lambda: rig.worker.num_running == 0)
        await rig.running.freed()
        await rig.completes(rig.submit("after"))


async def test_text_that_cannot_be_made_fails_only_its_prompt():
    def stream(call, context):
        if len(context) == 41:
            raise RuntimeError("no text")
        return call(context)

    gate = Gate()
    async with prefilling(forward=gate, tokens=Meddler(tokenizer(), stream=stream)) as rig:
        first = rig.submit("first")
        await until(lambda: gate.entered == 1)
        prompts = [rig.submit(f"r{length}", prompt_of(length)) for length in (40, 41, 42)]
        gate.open()
        assert (await prompts[1].error()).reason == "BUG"
        for prompt in (first, prompts[0], prompts[2]):
            await rig.completes(prompt)
        assert rig.worker.stats.num_batches == 2


async def test_a_row_without_usable_logits_fails_only_its_prompt():
    gate = Gate()

    def forward(call, batch):
        logits = gate(call, batch).clone()
        if len(logits) == 3:
            logits[1] = NAN
        return logits

    async with prefilling(forward=forward) as rig:
        first = rig.submit("first")
        await until(lambda: gate.entered == 1)
        prompts = [rig.submit(f"r{i}", prompt_of(40, start=i)) for i in range(3)]
        gate.open()
        reasons = []
        for prompt in prompts:
            event = await prompt.next()
            reasons.append(event.reason if isinstance(event, TandemError) else "")
        assert reasons == ["", "NUMERICS", ""]
        for prompt in (prompts[0], prompts[2]):
            await rig.running.client.release(await prompt.handle())
        await rig.completes(first)


async def test_kv_that_is_not_finite_ends_a_long_prompt_before_it_is_computed():
    gate = Gate()

    def forward(call, batch):
        result = gate(call, batch)
        rig.model.cache._data[0, 0, 0, prompt.job.blocks[0]] = NAN
        return result

    async with prefilling(forward=forward, **LONG) as rig:
        prompt = rig.submit(token_ids=prompt_of(100))
        gate.let()
        assert (await prompt.error()).reason == "NUMERICS"
        gate.open()
        await until(lambda: rig.pool.audit().is_empty)
        assert prompt.is_silent, "a prompt that failed says nothing more"
        assert gate.entered <= 2
        assert rig.store.counters.sealed == 0


async def test_a_full_store_refuses_and_frees_the_blocks():
    async with prefilling(store_bytes=1000) as rig:
        prompt = rig.submit()
        while isinstance(event := await prompt.next(), OutputDelta):
            pass  # which of the two is first is not said
        assert event.reason == "NEVER_FITS"


# --- the end --------------------------------------------------------------------------------------


async def test_stopping_sends_everybody_away_and_finishes_hand_offs():
    gate, held = Gate(), Held()
    async with prefilling(num_blocks=20, forward=gate, client={"put": held.put}, **LONG) as rig:
        handing = rig.submit("handing", prompt_of(20))
        gate.let()
        await handing.token()
        await held.entered.wait()
        take_all(rig, but=8)
        computing = rig.submit("computing", prompt_of(100))
        await until(lambda: gate.entered == 2)
        waiting = rig.submit("waiting", prompt_of(60))
        stopping = asyncio.create_task(rig.worker.stop())
        await until(lambda: rig.worker._stopping)
        gate.open()
        assert [(await p.error()).reason for p in (computing, waiting)] == ["DRAINING", "DRAINING"]
        assert not stopping.done()
        held.may_go.set()
        await rig.running.client.release(await handing.handle())
        await stopping
        assert [owner.owner for owner in rig.pool.audit().owners] == ["somebody"]
        with pytest.raises(Unavailable) as caught:
            rig.submit("late")
        assert caught.value.reason == "DRAINING"
        rig.pool.release("somebody")
        await rig.running.freed()


async def test_stopping_a_worker_that_did_nothing():
    async with prefilling() as rig:
        await rig.worker.stop()


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_is_cancelled_nothing_stays_owned(seed):
    rng = random.Random(seed)
    async with prefilling(num_blocks=24, token_budget=64, chunk_bytes=8192) as rig:
        ends: list[asyncio.Task] = []

        async def use(number: int) -> None:
            length = rng.choice([1, 5, 17, 40, 64, 65, 100, 200])
            prompt = rig.submit(f"r{number}", prompt_of(length, start=number), max_tokens=rng.choice([1, 5]))
            if rng.random() < 0.4:
                await asyncio.sleep(rng.random() * 0.02)
                rig.worker.cancel(prompt.job)
                return
            delta = await prompt.token()
            assert delta.token_ids == greedy(prompt.work.token_ids, 1)
            if delta.finish is None:
                await rig.running.client.release(await prompt.handle())

        for number in range(40):
            ends.append(asyncio.create_task(use(number)))
            await asyncio.sleep(rng.random() * 0.004)
        await asyncio.gather(*ends)
        await until(lambda: rig.pool.audit().is_empty)
        await rig.running.freed()


async def test_the_books_name_the_pool():
    async with prefilling(num_blocks=7) as rig:
        audit = rig.worker.audit()
        assert (audit.pool, audit.unit, audit.total, audit.is_empty) == ("prefill", "blocks", 7, True)


def test_a_job_counts_its_tokens():
    job = PrefillJob(make_work("r", [1, 2, 3], delivered=[4]), lambda event: None)
    job.num_computed = 3
    assert (job.num_tokens, job.num_left) == (4, 1)
