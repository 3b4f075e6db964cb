"""A request's life on a decode worker: joining, leaving, and every way it can end."""

from __future__ import annotations

import asyncio
import random

import pytest

from decode_worker import reservation
from tandem.errors import InvalidRequest, Unavailable
from tandem.request import FinishReason
from tests.checkpoints import EOS
from tests.decode_worker.rig import Client, decoding, make_order, store_kv, text_of, tokens_of
from tests.serving import BLOCK_SIZE, NAN, BatchGate, Gate, Meddler, greedy, prompt_of, tokenizer, until

# --- what comes out -------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 15, 16, 31, 100])
async def test_output_is_the_models_own(length):
    prompt = prompt_of(length)
    async with decoding() as rig:
        await rig.start(make_order(prompt=prompt, max_tokens=20))
        deltas = await rig.client.all()
        assert tokens_of(deltas) == greedy(prompt, 20)[1:]
        assert deltas[-1].finish is FinishReason.LENGTH
        assert all(delta.finish is None for delta in deltas[:-1])
        assert rig.client.is_silent("r")
        await rig.running.freed()


async def test_a_batch_changes_nobodys_output():
    async with decoding(max_batch=8) as rig:
        prompts = [prompt_of(length, start=length) for length in (3, 20, 50, 7, 33, 64)]
        for index, prompt in enumerate(prompts):
            await rig.start(make_order(f"r{index}", prompt, max_tokens=12))
        for index, prompt in enumerate(prompts):
            assert tokens_of(await rig.client.all(f"r{index}")) == greedy(prompt, 12)[1:]


@pytest.mark.parametrize("delivered", [1, 2, 7, 11])
async def test_a_resumed_request_goes_on_where_it_was(delivered):
    async with decoding() as rig:
        await rig.start(make_order(delivered=delivered, max_tokens=12))
        deltas = await rig.client.all()
        assert tokens_of(deltas) == greedy(prompt_of(20), 12)[delivered:]


@pytest.mark.parametrize("seed", [0, 1])
async def test_a_sampled_request_resumes_with_the_same_numbers(seed):
    sampling = {"temperature": 1.0, "top_p": 0.9, "seed": seed, "max_tokens": 12, "frequency_penalty": 0.5}
    async with decoding() as rig:
        work = make_order("whole", **sampling)
        await rig.start(work)
        whole = (work.token_ids[-1], *tokens_of(await rig.client.all("whole")))
        resumed = make_order("resumed", delivered=0, **sampling)
        object.__setattr__(resumed, "token_ids", resumed.token_ids + whole[:5])
        await rig.start(resumed)
        assert tokens_of(await rig.client.all("resumed")) == whole[5:]


async def test_sequences_join_and_leave_at_any_step():
    gate = Gate()
    async with decoding(forward=gate, max_batch=8) as rig:
        orders = [make_order(f"r{i}", prompt_of(10, start=i), max_tokens=4 + 3 * (i % 3)) for i in range(6)]
        for steps, order in enumerate(orders, 1):
            await rig.start(order)
            await rig.client.started(order.request_id)
            await until(lambda steps=steps: gate.entered >= steps)
            gate.let()
        gate.open()
        for order in orders:
            expected = greedy(order.token_ids[: order.num_prompt_tokens], order.max_tokens)[1:]
            assert await rig.client.tokens(order.request_id, len(expected)) == expected


async def test_no_more_than_max_batch_run_and_the_others_wait_their_turn():
    gate = BatchGate()
    async with decoding(forward=gate, max_batch=2) as rig:
        for index in range(5):
            await rig.start(make_order(f"r{index}", max_tokens=4))
            await rig.client.started(f"r{index}")
        await until(lambda: rig.worker.num_running >= 1)
        gate.open()
        for index in range(5):
            assert await rig.client.tokens(f"r{index}", 3) == greedy(prompt_of(20), 4)[1:]
        assert max(gate.sizes) == 2
        assert sum(gate.sizes) == 15


async def test_one_message_per_client_and_step():
    gate = Gate()
    async with decoding(forward=gate, max_batch=8) as rig:
        other = Client()
        for index in range(4):
            await rig.start(make_order(f"r{index}", max_tokens=9), other if index == 3 else None)
        for index in range(3):
            await rig.client.started(f"r{index}")
        await other.started("r3")
        await until(lambda: gate.entered == 1)
        gate.let()
        await until(lambda: gate.entered == 2)
        await asyncio.sleep(0)  # the first step's messages are on the loop, perhaps behind this test
        seen, seen_other = len(rig.client.messages), len(other.messages)
        gate.let()
        await until(lambda: gate.entered == 3)
        await until(lambda: len(rig.client.messages) == seen + 1 and len(other.messages) == seen_other + 1)
        assert [name for name, _ in rig.client.messages[-1]] == ["r0", "r1", "r2"]
        assert [name for name, _ in other.messages[-1]] == ["r3"]
        gate.open()
        await other.tokens("r3", 8)


async def test_logprobs_come_with_each_token():
    async with decoding() as rig:
        await rig.start(make_order(logprobs=2, max_tokens=4))
        deltas = await rig.client.all()
        assert [len(entry.top) for delta in deltas for entry in delta.logprobs] == [2, 2, 2]


# --- stops ----------------------------------------------------------------------------------------


async def test_a_stop_token_ends_without_text():
    tokens = greedy(prompt_of(20), 8)
    async with decoding() as rig:
        await rig.start(make_order(stop_token_ids=(tokens[4],)))
        deltas = await rig.client.all()
        first = tokens.index(tokens[4], 1)
        assert tokens_of(deltas) == tokens[1 : first + 1]
        assert (deltas[-1].finish, deltas[-1].matched_stop) == (FinishReason.STOP, tokens[4])
        assert EOS not in tokens_of(deltas)
        assert text_of(deltas) == tokenizer().decode(tokens_of(deltas)[:-1])


async def test_the_end_of_text_token_ends_unless_it_is_ignored():
    bias = {"logit_bias": {EOS: 100.0}}
    async with decoding() as rig:
        await rig.start(make_order("ends", **bias))
        deltas = await rig.client.all("ends")
        assert (tokens_of(deltas), deltas[-1].finish) == ((EOS,), FinishReason.STOP)
        await rig.start(make_order("ignores", ignore_eos=True, max_tokens=4, **bias))
        deltas = await rig.client.all("ignores")
        assert (tokens_of(deltas), deltas[-1].finish) == ((EOS,) * 3, FinishReason.LENGTH)


async def test_min_tokens_hold_the_end_off():
    async with decoding() as rig:
        await rig.start(make_order(logit_bias={EOS: 50.0}, min_tokens=5))
        tokens = tokens_of(await rig.client.all())
        assert len(tokens) == 5
        assert tokens.index(EOS) == 4


async def test_a_stop_string_ends_before_itself():
    prompt = prompt_of(20)
    async with decoding() as rig:
        await rig.start(make_order("free", max_tokens=30, ignore_eos=True))
        free = text_of(await rig.client.all("free"))
        stop = next(free[i : i + 2] for i in range(4, len(free)) if "\ufffd" not in free[i : i + 2])
        await rig.start(make_order("stopped", prompt, max_tokens=30, ignore_eos=True, stop=(stop,)))
        deltas = await rig.client.all("stopped")
        assert text_of(deltas) == free[: free.index(stop)]
        assert (deltas[-1].finish, deltas[-1].matched_stop) == (FinishReason.STOP, stop)


# --- cancellation and deadlines -------------------------------------------------------------------


async def test_cancelled_before_its_first_step():
    async with decoding() as rig:
        work = make_order()
        handle = await store_kv(rig.running, work)
        rig.worker.cancel(rig.worker.start(work, handle, rig.client.emit))
        await until(lambda: rig.worker.num_waiting == 0)
        assert rig.client.is_silent("r")
        await rig.running.client.release(handle)


async def test_cancelled_while_waiting_for_memory():
    async with decoding(num_blocks=4) as rig:
        rig.pool.allocate("somebody", 4 * BLOCK_SIZE)
        sequence = await rig.start(make_order())
        await asyncio.sleep(0.02)
        assert rig.worker.num_waiting == 1
        rig.worker.cancel(sequence)
        await until(lambda: rig.worker.num_waiting == 0)
        rig.pool.release("somebody")
        await rig.running.client.release(sequence.handle)


async def test_cancelled_while_kv_arrives():
    gate = Gate()
    async with decoding(write_blocks=gate) as rig:
        sequence = await rig.start(make_order(prompt=prompt_of(60)))
        await until(lambda: gate.entered == 1)
        rig.worker.cancel(sequence)
        rig.worker.cancel(sequence)
        await asyncio.sleep(0.02)
        assert rig.pool.num_free < rig.pool.num_blocks, "a write is under way"
        gate.let()
        await until(lambda: rig.pool.audit().is_empty)
        assert gate.entered == 1
        assert rig.client.is_silent("r")
        await rig.running.client.release(sequence.handle)


async def test_cancelled_while_waiting_for_a_place_in_the_batch():
    gate = Gate()
    async with decoding(forward=gate, max_batch=1) as rig:
        await rig.start(make_order("runs"))
        await until(lambda: gate.entered == 1)
        waiting = await rig.start(make_order("waits"))
        await rig.client.started("waits")
        rig.worker.cancel(waiting)
        gate.open()
        await rig.client.all("runs")
        await until(lambda: rig.pool.audit().is_empty)
        assert rig.client.is_silent("waits")


async def test_cancelled_while_running():
    gate = Gate()
    async with decoding(forward=gate) as rig:
        sequence = await rig.start(make_order("r"))
        stays = await rig.start(make_order("stays"))
        await rig.client.started("stays")
        gate.let(2)
        await until(lambda: gate.entered == 3)
        rig.worker.cancel(sequence)
        gate.open()
        await rig.client.tokens("stays", 7)
        await until(lambda: rig.pool.audit().is_empty)
        assert stays.is_finished
        assert not sequence.is_finished


async def test_cancelling_late_or_twice_is_harmless():
    async with decoding() as rig:
        sequence = await rig.start(make_order("a"))
        await rig.client.all("a")
        rig.worker.cancel(sequence)
        rig.worker.cancel(sequence)
        await rig.start(make_order("b"))
        await rig.client.all("b")


async def test_the_deadline_while_decoding_says_how_much_was_sent():
    gate = Gate()
    async with decoding(forward=gate) as rig:
        sequence = await rig.start(make_order(timeout_s=1.0))
        gate.let(2)
        await until(lambda: gate.entered == 3)
        await asyncio.sleep(sequence.work.time_left_s() + 0.01)
        gate.open()
        error = await rig.client.error()
        assert error.reason == "DEADLINE_DECODE"
        assert error.metadata == {"tokens_delivered": "4"}
        await until(lambda: rig.pool.audit().is_empty)


async def test_the_deadline_while_waiting_for_memory():
    async with decoding(num_blocks=4) as rig:
        rig.pool.allocate("somebody", 4 * BLOCK_SIZE)
        sequence = await rig.start(make_order(timeout_s=0.1))
        assert (await rig.client.error()).reason == "DEADLINE_TRANSFER"
        rig.pool.release("somebody")
        await rig.running.client.release(sequence.handle)


async def test_the_deadline_while_kv_arrives_keeps_the_blocks_until_the_write_has_ended():
    gate = Gate()
    async with decoding(write_blocks=gate) as rig:
        sequence = await rig.start(make_order(prompt=prompt_of(60), timeout_s=1.0))
        await until(lambda: gate.entered == 1)
        await asyncio.sleep(sequence.work.time_left_s() + 0.05)
        assert rig.client.is_silent("r")
        assert rig.pool.num_free < rig.pool.num_blocks
        gate.let()
        assert (await rig.client.error()).reason == "DEADLINE_TRANSFER"
        await until(lambda: rig.pool.audit().is_empty)
        await rig.running.client.release(sequence.handle)


# --- memory ---------------------------------------------------------------------------------------


async def test_memory_that_comes_in_time_is_waited_for():
    gate = Gate()
    async with decoding(num_blocks=3, forward=gate) as rig:
        await rig.start(make_order("first", max_tokens=20))
        await rig.client.started("first")
        await rig.start(make_order("second", max_tokens=20))
        await asyncio.sleep(0.02)
        assert rig.client.is_silent("second")
        gate.open()
        await rig.client.tokens("first", 19)
        await rig.client.all("second")


async def test_without_memory_a_request_is_refused_after_a_moment(monkeypatch):
    monkeypatch.setattr(reservation, "PATIENCE_S", 0.1)
    async with decoding(num_blocks=4) as rig:
        rig.pool.allocate("somebody", 3 * BLOCK_SIZE)
        sequence = await rig.start(make_order())
        error = await rig.client.error()
        assert error.reason == "NO_MEMORY_FIT_NOW"
        assert error.retry_after_ms
        assert rig.pool.num_free == 1
        rig.pool.release("somebody")
        await rig.running.client.release(sequence.handle)


async def test_what_can_never_fit_or_makes_no_sense_is_refused_at_once():
    async with decoding(num_blocks=4) as rig:
        handle = await store_kv(rig.running, make_order())
        for reason, work in (
            ("NEVER_FITS", make_order(max_tokens=45)),
            ("BAD_PARAM", make_order(logit_bias={257: 1.0})),
        ):
            with pytest.raises(InvalidRequest) as caught:
                rig.worker.start(work, handle, rig.client.emit)
            assert caught.value.reason == reason
        assert rig.worker.num_waiting == 0
        rig.worker.start(make_order(max_tokens=44), handle, rig.client.emit)
        await rig.client.all()


async def test_the_same_attempt_twice_does_not_share_blocks(monkeypatch):
    monkeypatch.setattr(reservation, "PATIENCE_S", 0.1)
    gate = Gate()
    async with decoding(forward=gate) as rig:
        work, other = make_order(max_tokens=20), Client()
        handle = await store_kv(rig.running, work)
        rig.worker.start(work, handle, rig.client.emit)
        await rig.client.started()
        rig.worker.start(work, handle, other.emit)
        assert (await other.error()).reason == "NO_MEMORY_FIT_NOW"
        gate.open()
        assert await rig.client.tokens(num_tokens=19) == greedy(prompt_of(20), 20)[1:]


# --- faults ---------------------------------------------------------------------------------------


async def test_a_row_without_usable_logits_fails_only_its_sequence():
    gate = Gate()

    def forward(call, batch):
        logits = gate(call, batch).clone()
        if len(logits) == 3:
            logits[1] = NAN
        return logits

    async with decoding(forward=forward) as rig:
        for name in ("a", "b", "c"):
            await rig.start(make_order(name, max_tokens=8))
            await rig.client.started(name)
        gate.open()
        assert (await rig.client.error("b")).reason == "NUMERICS"
        for name in ("a", "c"):
            assert await rig.client.tokens(name, 7) == greedy(prompt_of(20), 8)[1:]
        assert rig.client.is_silent("b")


@pytest.mark.parametrize(
    ("fault", "reason"), [(RuntimeError("secret"), "BUG"), (MemoryError(), "NO_MEMORY_FIT_NOW")]
)
async def test_a_forward_that_raises_fails_its_batch_and_the_worker_lives_on(fault, reason):
    gate = Gate()

    def forward(call, batch):
        if gate.entered == 2:
            gate.entered += 1
            raise fault
        return gate(call, batch)

    async with decoding(forward=forward, max_batch=2) as rig:
        for name in ("a", "b", "waits"):
            await rig.start(make_order(name))
            await rig.client.started(name)
        gate.open()
        errors = [await rig.client.error(name) for name in ("a", "b")]
        assert [error.reason for error in errors] == [reason] * 2
        assert "secret" not in str(errors[0])
        assert await rig.client.tokens("waits", 7) == greedy(prompt_of(20), 8)[1:]
        await rig.start(make_order("after"))
        await rig.client.all("after")


async def test_text_that_cannot_be_made_fails_only_its_sequence():
    class Broken:
        def step(self, token_id):
            if token_id != first:
                raise RuntimeError("no text")
            return ""

    def stream(call, context):
        return Broken() if len(context) == 21 else call(context)

    first = greedy(prompt_of(21), 1)[0]
    gate = Gate()
    async with decoding(forward=gate, tokens=Meddler(tokenizer(), stream=stream)) as rig:
        for name, length in (("a", 20), ("b", 21), ("c", 22)):
            await rig.start(make_order(name, prompt_of(length)))
            await rig.client.started(name)
        gate.open()
        assert (await rig.client.error("b")).reason == "BUG"
        for name, length in (("a", 20), ("c", 22)):
            assert await rig.client.tokens(name, 7) == greedy(prompt_of(length), 8)[1:]


async def test_kv_that_cannot_be_read_is_said_and_frees_the_blocks():
    async with decoding() as rig:
        work = make_order()
        handle = await store_kv(rig.running, work)
        await rig.running.client.release(handle)
        rig.worker.start(work, handle, rig.client.emit)
        assert (await rig.client.error()).reason == "STALE_HANDLE"
        assert rig.pool.audit().is_empty


async def test_a_foreign_exception_while_reading_is_a_bug_without_its_text():
    def write_blocks(call, *args):
        raise ValueError("secret")

    async with decoding(write_blocks=write_blocks) as rig:
        sequence = await rig.start(make_order())
        error = await rig.client.error()
        assert error.reason == "BUG"
        assert "secret" not in str(error)
        await rig.running.client.release(sequence.handle)


# --- the end --------------------------------------------------------------------------------------


async def test_stopping_ends_every_request_in_every_state_with_an_answer():
    run, write = Gate(), Gate()
    write.let(4)  # the KV of two requests, two layers of one block each
    async with decoding(num_blocks=12, forward=run, write_blocks=write, max_batch=1) as rig:
        for name in ("runs", "waits"):
            await rig.start(make_order(name, prompt_of(10)))
            await rig.client.started(name)
        reading = await rig.start(make_order("reads", prompt_of(10)))
        await until(lambda: write.entered == 5)
        rig.pool.allocate("somebody", rig.pool.num_free * BLOCK_SIZE)
        starving = await rig.start(make_order("starves", prompt_of(10)))
        await asyncio.sleep(0.01)
        fresh = rig.worker.start(
            make_order("fresh"), await store_kv(rig.running, make_order("fresh")), rig.client.emit
        )
        stopping = asyncio.create_task(rig.worker.stop())
        await asyncio.sleep(0.02)
        with pytest.raises(Unavailable):
            rig.worker.start(make_order("late"), fresh.handle, rig.client.emit)
        assert not stopping.done()
        write.open()
        await until(lambda: rig.worker._stopping)  # steps are fast enough to finish what runs before that
        run.open()
        await stopping
        for name in ("runs", "waits", "reads", "starves", "fresh"):
            assert (await rig.client.error(name)).reason == "DRAINING"
        rig.pool.release("somebody")
        for sequence in (reading, starving, fresh):
            await rig.running.client.release(sequence.handle)
        await rig.running.freed()


async def test_stopping_an_idle_worker_twice():
    async with decoding() as rig:
        await rig.worker.stop()


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_is_cancelled_nothing_stays_owned(seed):
    rng = random.Random(seed)
    async with decoding(num_blocks=40, max_batch=4) as rig:

        async def use(number: int) -> None:
            name, prompt = f"r{number}", prompt_of(rng.choice([1, 16, 17, 40]), start=number % 3)
            order = make_order(name, prompt, max_tokens=rng.choice([2, 5, 9]))
            sequence = await rig.start(order)
            if rng.random() < 0.5:
                await asyncio.sleep(rng.random() * 0.03)
                rig.worker.cancel(sequence)
                await rig.running.client.release(sequence.handle)
                return
            assert tokens_of(await rig.client.all(name)) == greedy(prompt, order.max_tokens)[1:]

        uses = []
        for number in range(25):
            uses.append(asyncio.create_task(use(number)))
            await asyncio.sleep(rng.random() * 0.006)
        await asyncio.gather(*uses)
        await until(lambda: rig.pool.audit().is_empty)
        await rig.running.freed()


async def test_the_books_name_the_pool():
    async with decoding(num_blocks=7) as rig:
        audit = rig.worker.audit()
        assert (audit.pool, audit.unit, audit.total) == ("decode", "blocks", 7)
        assert rig.pool.num_free == 7
