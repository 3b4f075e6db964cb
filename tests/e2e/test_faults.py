"""A part is lost, lies, or stands still: what was streamed stays right, and what was held comes back.

Rows A, B, C, F and O of the fault matrix. Each test breaks a cluster of its own, sees the fault happen,
and compares with the undisturbed run.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from router import flight
from router.ask import Ask
from tandem.errors import ConfigError, DeadlineExceeded, FailedPrecondition, Overloaded
from tandem.request import Mark
from tandem.worker_host import WorkerHost
from tests.e2e.harness import (
    Result,
    ask,
    complete,
    config,
    corrupt_reads,
    crash,
    drain,
    failure,
    fall_silent,
    gate,
    gated_puts,
    gated_reads,
    open_stream,
    read_all,
    read_tokens,
    restart_store,
    running,
    slow_runs,
    slow_steps,
    store_of,
    until,
)

LONG = {"max_tokens": 40, "ignore_eos": True}
SAMPLED = {**LONG, "temperature": 1.0, "seed": 11, "presence_penalty": 0.5, "logprobs": 1, "min_tokens": 30}
QUICK_LOSS = {"heartbeat_s": 0.2, "worker_timeout_s": 1.0}
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
PAIRS = [pytest.param(LONG, id="greedy"), pytest.param(SAMPLED, id="sampled")]


def same(result, wanted):
    """Nothing doubled, nothing skipped, nothing changed. Positions were checked as the chunks came."""
    assert result.token_ids == wanted.token_ids
    assert result.text == wanted.text
    assert [entry.logprob for entry in result.logprobs] == pytest.approx(
        [entry.logprob for entry in wanted.logprobs], abs=1e-4
    )
    assert result.reason == wanted.reason
    assert result.finished.usage.completion == len(wanted.token_ids)
    timings = result.finished.timings
    parts = [getattr(timings, mark.value) for mark in Mark]
    assert timings.total_ms == pytest.approx(sum(parts), abs=1e-6)


def by_id(workers, worker_id):
    return next(worker for worker in workers if worker.worker.audit().pool == worker_id)


# --- decode workers ---


@pytest.mark.parametrize("sampling", PAIRS)
async def test_a_decode_worker_lost_in_mid_stream(sampling):
    """B2: another one goes on at the next position."""
    async with running(num_decode=2) as cluster:
        wanted = await complete(cluster, ask("a story", **sampling))
        with slow_steps(cluster.decodes[0]), slow_steps(cluster.decodes[1]):
            call = open_stream(cluster, ask("a story", **sampling))
            result = await read_tokens(call, Result(), 10)
            lost = by_id(cluster.decodes, result.admitted[0].decode_worker)
            await crash(lost)
            await drain(call, result)

        same(result, wanted)
        assert [admitted.decode_worker for admitted in result.admitted] == sorted(
            ["decode-0", "decode-1"], key=lambda name: name != lost.worker.audit().pool
        )
        await until(lambda: len(cluster.router.registry.views()) == 2)


async def test_many_streams_outlive_their_decode_worker():
    """The router's budget for second plans covers a worker's requests."""
    async with running(num_decode=2) as cluster:
        prompts = [f"story number {index}" for index in range(8)]
        wanted = [await complete(cluster, ask(prompt, **LONG)) for prompt in prompts]
        with slow_steps(cluster.decodes[0]), slow_steps(cluster.decodes[1]):
            sending = [asyncio.create_task(complete(cluster, ask(prompt, **LONG))) for prompt in prompts]
            await until(lambda: all(worker.worker.num_running == 4 for worker in cluster.decodes))
            await crash(cluster.decodes[0])
            results = await asyncio.gather(*sending)

        for result, undisturbed in zip(results, wanted, strict=True):
            same(result, undisturbed)
        assert sum(len(result.admitted) for result in results) == 12


async def test_a_stop_string_that_began_before_the_loss():
    """B3: the text held back for it is neither lost nor sent twice."""
    async with running(num_decode=2) as cluster:
        plain = await complete(cluster, ask("a story", **LONG, logit_bias={65: 0.1}))
        stop = plain.text[15:25]
        wanted = await complete(cluster, ask("a story", **LONG, stop=[stop, plain.text[30:] + "~"]))
        with slow_steps(cluster.decodes[0]), slow_steps(cluster.decodes[1]):
            call = open_stream(cluster, ask("a story", **LONG, stop=[stop, plain.text[30:] + "~"]))
            result = await read_tokens(call, Result(), 10)
            await crash(by_id(cluster.decodes, result.admitted[0].decode_worker))
            await drain(call, result)

        same(result, wanted)
        assert result.finished.stop_string == wanted.finished.stop_string == stop


async def test_a_decode_worker_lost_during_the_transfer():
    """B1."""
    async with running(num_decode=2) as cluster:
        wanted = await complete(cluster, ask("a story", **LONG))
        with gated_reads(cluster.decodes[0]) as held:
            call = open_stream(cluster, ask("a story", **LONG))
            result = await read_tokens(call, Result(), 1)
            await until(lambda: held.num_arrived)
            await crash(cluster.decodes[0])
            await drain(call, result)

        same(result, wanted)


async def test_a_decode_worker_that_falls_silent_and_comes_back():
    """B4: its late tokens reach nobody, and its blocks come back."""
    async with running(config(router=QUICK_LOSS), num_decode=2) as cluster:
        wanted = await complete(cluster, ask("a story", **LONG))
        with slow_steps(cluster.decodes[0]), slow_steps(cluster.decodes[1]):
            call = open_stream(cluster, ask("a story", **LONG))
            result = await read_tokens(call, Result(), 5)
            silent = by_id(cluster.decodes, result.admitted[0].decode_worker)
            with gate(silent.worker._decoder, "step") as held:
                await fall_silent(silent)
                await drain(call, result)
                assert held.num_passed == 0
                assert silent.worker.audit().owned > 0

        same(result, wanted)


async def test_the_last_decode_worker_is_lost_for_good(monkeypatch):
    """What was sent is valid and the client learns how much it is: never UNAVAILABLE after a token."""
    monkeypatch.setattr("router.planner.WORKER_WAIT_S", 0.5)
    async with running() as cluster:
        with slow_steps(cluster.decodes[0]):
            call = open_stream(cluster, ask("a story", **LONG))
            result = await read_tokens(call, Result(), 5)
            await crash(cluster.decodes[0])
            failed = await failure(drain(call, result))

        count = len(result.token_ids)
        assert (failed.code, failed.reason) == ("ABORTED", "STREAM_BROKEN")
        assert failed.error.metadata == {"tokens_delivered": str(count)}
        assert failed.message == (
            f"generation stopped after {count} tokens because a worker was lost; "
            "tokens already sent are valid"
        )


async def test_a_worker_with_less_room_than_the_router_believes():
    """O9: it refuses, and another plan is made."""
    async with running(num_decode=2) as cluster:
        wanted = await complete(cluster, ask("a story", **LONG))
        first = by_id(cluster.decodes, wanted.admitted[0].decode_worker)
        pool = first.worker._pool
        assert pool.allocate("somebody else's", pool.num_free * pool.block_size)
        result = await complete(cluster, ask("a story", **LONG))
        pool.release("somebody else's")

        same(result, wanted)
        assert len(result.admitted) == 2


async def test_workers_that_all_have_less_room_refuse_cleanly():
    async with running() as cluster:
        pool = cluster.decodes[0].worker._pool
        assert pool.allocate("somebody else's", (pool.num_free - 2) * pool.block_size)
        failed = await failure(complete(cluster, ask("a story", **LONG)))
        small = await complete(cluster, ask("a story", max_tokens=20))
        pool.release("somebody else's")

        assert (failed.code, failed.reason) == ("RESOURCE_EXHAUSTED", "NO_MEMORY_FIT_NOW")
        assert small.token_ids


# --- prefill workers ---


@pytest.mark.parametrize("lose", [crash, fall_silent])
async def test_a_prefill_worker_lost_before_the_put(lose):
    """A1, A6: another one takes the prompt; the late worker's KV is refused or freed."""
    async with running(config(router=QUICK_LOSS), num_prefill=2) as cluster:
        wanted = await complete(cluster, ask("a story", **LONG))
        lost = by_id(cluster.prefills, wanted.admitted[0].prefill_worker)
        with gate(lost.worker._runner, "run") as held:
            sending = asyncio.create_task(complete(cluster, ask("a story", **LONG)))
            await until(lambda: held.num_arrived)
            await lose(lost)
            result = await sending

        same(result, wanted)
        assert len(result.admitted) == 2


@pytest.mark.parametrize("lose", [crash, fall_silent])
async def test_a_prefill_worker_lost_during_the_put(lose):
    """A2: the half that was sent is freed, and was never readable."""
    settings = config(router=QUICK_LOSS, prefill={"token_budget": 64})
    async with running(settings, num_prefill=2) as cluster:
        prompt = "x" * 150
        wanted = await complete(cluster, ask(prompt, **LONG))
        lost = by_id(cluster.prefills, wanted.admitted[0].prefill_worker)
        run, chunks = lost.worker._runner.run, []
        with gate(lost.worker._runner, "run") as held:
            gated = lost.worker._runner.run
            lost.worker._runner.run = lambda c: (chunks.append(c), (run if len(chunks) == 1 else gated)(c))[1]
            sending = asyncio.create_task(complete(cluster, ask(prompt, **LONG)))
            await until(lambda: held.num_arrived and store_of(cluster).audit().owned)
            await lose(lost)
            result = await sending

        same(result, wanted)
        assert store_of(cluster).counters.sealed == 2


async def test_a_prefill_worker_lost_after_its_first_token():
    """The token it sent is part of the next worker's prompt."""
    async with running(num_prefill=2) as cluster:
        wanted = await complete(cluster, ask("a story", **SAMPLED))
        lost = by_id(cluster.prefills, wanted.admitted[0].prefill_worker)
        with gated_puts(lost) as held:
            call = open_stream(cluster, ask("a story", **SAMPLED))
            result = await read_tokens(call, Result(), 1)
            await until(lambda: held.num_arrived)
            await crash(lost)
            await drain(call, result)

        same(result, wanted)
        assert len(result.admitted) == 2


@pytest.mark.parametrize("streams", [True, False])
async def test_many_prompts_outlive_their_prefill_worker(monkeypatch, streams):
    """All that were on one stream are planned again; so are those of a worker of the version before, which is
    asked prompt by prompt."""
    start = WorkerHost.start

    async def as_version(host, info, *others):
        info.streams_prefill = streams and info.streams_prefill
        info.takes_bundles = streams
        await start(host, info, *others)

    monkeypatch.setattr(WorkerHost, "start", as_version)
    async with running(config(prefill={"token_budget": 32}), num_prefill=2) as cluster:
        prompts = [f"story number {index}" for index in range(8)]
        wanted = [await complete(cluster, ask(prompt, **LONG)) for prompt in prompts]
        with ExitStack() as stack:
            held = [stack.enter_context(gate(one.worker._runner, "run")) for one in cluster.prefills]
            sending = [asyncio.create_task(complete(cluster, ask(prompt, **LONG))) for prompt in prompts]
            await until(lambda: all(gated.num_arrived for gated in held))
            await until(lambda: cluster.router.dispatcher.num_flights == len(prompts))
            await crash(cluster.prefills[0])
        results = await asyncio.gather(*sending)

        for result, undisturbed in zip(results, wanted, strict=True):
            same(result, undisturbed)
        assert sum(len(result.admitted) for result in results) == 12


async def test_the_only_prefill_worker_restarts():
    """A broken connection is a lost worker, so the second plan waits for the next one."""
    async with running(config(router={"prefill_fallback": False})) as cluster:
        wanted = await complete(cluster, ask("a story", **LONG))
        [lost] = cluster.prefills
        with gate(lost.worker._runner, "run") as held:
            sending = asyncio.create_task(complete(cluster, ask("a story", **LONG)))
            await until(lambda: held.num_arrived)
            await crash(lost)
            await until(lambda: not cluster.router.is_ready, 1.0)
            await cluster.add_prefill("prefill-0")
            result = await sending

        same(result, wanted)


async def test_a_forward_that_fails_ends_its_request_as_a_bug(caplog):
    """O11, A7: an id for the operator, nothing of the exception for the client, and the worker lives."""
    async with running() as cluster:
        for worker, name in (
            (cluster.prefills[0].worker._runner, "run"),
            (cluster.decodes[0].worker._decoder, "step"),
        ):
            original = getattr(worker, name)

            def explode(batch):
                raise ValueError("secret detail")

            setattr(worker, name, explode)
            failed = await failure(complete(cluster, ask("a story", **LONG)))
            setattr(worker, name, original)

            assert (failed.code, failed.reason, failed.message) == ("INTERNAL", "BUG", "internal error")
            assert "secret" not in failed.text + repr(failed.trailing)
            [told] = [record for record in caplog.records if "secret detail" in str(record.exc_text)]
            assert failed.error.error_id in told.getMessage()
            caplog.clear()
            assert (await complete(cluster, ask("a story", **LONG))).token_ids


# --- the store ---


async def test_kv_corrupted_once_is_computed_again():
    """B6: never decoded from, and the text is the same."""
    async with running() as cluster:
        wanted = await complete(cluster, ask("a story", **SAMPLED))
        with corrupt_reads(cluster, times=1) as flips:
            result = await complete(cluster, ask("a story", **SAMPLED))

        assert len(flips) == 1
        same(result, wanted)
        assert len(result.admitted) == 2
        assert cluster.decodes[0].worker._restorer._client.verify_failures == 1


async def test_kv_corrupted_twice_is_data_loss():
    async with running() as cluster:
        with corrupt_reads(cluster, times=2) as flips:
            failed = await failure(complete(cluster, ask("a story", **LONG)))

        assert len(flips) == 2
        assert (failed.code, failed.reason) == ("DATA_LOSS", "KV_CORRUPT")
        assert failed.message == "cached state failed its check twice; nothing wrong was sent"
        assert (await complete(cluster, ask("a story", **LONG))).token_ids


@pytest.mark.parametrize("at", [1, -9, 3000])
async def test_any_flipped_bit_is_found(at):
    """C5: of the frame's header, its digest, its payload."""
    async with running() as cluster:
        store, original = store_of(cluster), store_of(cluster)._backend.get
        seen = []

        def get(key, index):
            message = bytearray(original(key, index))
            if not seen:
                message[at] ^= 1
            seen.append(key)
            return bytes(message)

        wanted = await complete(cluster, ask("a story", **LONG))
        store._backend.get = get
        same(await complete(cluster, ask("a story", **LONG)), wanted)
        assert len(seen) == 2


async def test_a_store_that_restarts_empty_before_the_fetch():
    """C2, B5: its old handles are stale, and the prompt is computed again."""
    async with running() as cluster:
        wanted = await complete(cluster, ask("a story", **SAMPLED))
        with gated_reads(cluster.decodes[0], before=True) as held:
            call = open_stream(cluster, ask("a story", **SAMPLED))
            result = await read_tokens(call, Result(), 1)
            await until(lambda: held.num_arrived)
            restart_store(cluster)
            held.open()
            await drain(call, result)

        same(result, wanted)
        assert len(result.admitted) == 2


async def test_a_store_that_forgets_everything_breaks_the_stream_in_our_words():
    """STALE_HANDLE is between us: no client ever sees it."""
    async with running() as cluster:
        store, lease = store_of(cluster), store_of(cluster).lease

        def forget(*args):
            restart_store(cluster)
            return lease(*args)

        store.lease = forget
        failed = await failure(complete(cluster, ask("a story", **LONG)))
        del store.lease

        assert (failed.code, failed.reason) == ("ABORTED", "STREAM_BROKEN")
        assert failed.error.metadata == {"tokens_delivered": "2"}


async def test_a_store_that_refuses_every_writer_is_down_for_the_client():
    """Before the first token, and so safe to send again."""
    async with running(config(prefill={"token_budget": 64})) as cluster:
        store, reserve = store_of(cluster), store_of(cluster).reserve

        def refuse(header, writer):
            raise FailedPrecondition("STALE_HANDLE", "a later attempt has written this object")

        store.reserve = refuse
        with slow_runs(cluster.prefills[0]):
            failed = await failure(complete(cluster, ask("x" * 400, **LONG)))
        store.reserve = reserve

        assert (failed.code, failed.reason) == ("UNAVAILABLE", "STORE_DOWN")
        assert failed.message == "KV store is unavailable"


async def test_a_transfer_that_stands_still_is_not_the_clients_deadline():
    """C4: one stalled read is planned again; the next one goes through."""
    async with running(config(kvstore={"put_deadline_s": 0.5})) as cluster:
        wanted = await complete(cluster, ask("a story", **LONG))
        read = cluster.decodes[0].worker._restorer._client._read
        stalled = []

        async def stall(call):
            if not stalled:
                stalled.append(call)
                raise DeadlineExceeded("transfer")  # what the client of the store says after its patience
            return await read(call)

        cluster.decodes[0].worker._restorer._client._read = stall
        same(await complete(cluster, ask("a story", **LONG)), wanted)
        assert stalled


# --- the router and its clients ---


async def test_a_router_that_drains_finishes_what_runs_and_refuses_the_rest():
    """O2, with the health service saying so first."""
    async with running() as cluster:
        wanted = await complete(cluster, ask("a story", **LONG))
        health = health_pb2_grpc.HealthStub(cluster.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        await follow(watch, SERVING)
        with slow_steps(cluster.decodes[0]):
            call = open_stream(cluster, ask("a story", **LONG))
            result = await read_tokens(call, Result(), 5)
            stopping = asyncio.create_task(cluster.router.stop(drain_s=20.0))
            await follow(watch, NOT_SERVING)
            failed = await failure(complete(cluster, ask("too late")))
            assert not stopping.done()
            await drain(call, result)
            await stopping

        same(result, wanted)
        assert (failed.code, failed.reason) == ("UNAVAILABLE", "DRAINING")
        assert failed.message == "server is shutting down"


async def test_what_outlives_the_drain_ends_with_a_count():
    async with running() as cluster:
        with slow_steps(cluster.decodes[0], 0.05):
            call = open_stream(cluster, ask("a story", **LONG))
            result = await read_tokens(call, Result(), 3)
            stopping = asyncio.create_task(cluster.router.stop(drain_s=0.2))
            failed = await failure(drain(call, result))
            await stopping

        assert (failed.code, failed.reason) == ("ABORTED", "STREAM_BROKEN")
        assert failed.error.metadata == {"tokens_delivered": str(len(result.token_ids))}


@pytest.mark.parametrize("several", [1, 4])
async def test_a_reader_that_never_reads_disturbs_nobody(several):
    """F3."""
    async with running() as cluster:
        wanted = await complete(cluster, ask("a story", **LONG))
        call = open_stream(cluster, ask("unread", max_tokens=400, ignore_eos=True, n=several, logprobs=20))
        await call.read()
        began_s = time.monotonic()
        same(await complete(cluster, ask("a story", **LONG)), wanted)
        assert time.monotonic() - began_s < 10
        call.cancel()


async def test_a_client_with_too_much_unread_is_given_up(monkeypatch):
    monkeypatch.setattr(flight, "MAX_BACKLOG", 3)
    async with running() as cluster:
        asked = Ask.from_pb(ask("unread", max_tokens=30, ignore_eos=True))
        with slow_steps(cluster.decodes[0]):  # else tokens come together, in fewer deltas
            [unread] = cluster.router.dispatcher.start(await cluster.router.intake.requests(asked))
            await unread.landed()
        with pytest.raises(Overloaded) as raised:
            await read_all(unread)
        assert await anext(unread, None) is None, "it has ended"

        assert raised.value.reason == "CLIENT_TOO_SLOW"
        assert raised.value.message == "client too slow: too many tokens were left unread"


async def follow(watch, status):
    """Until the health service says this."""
    async with asyncio.timeout(5):
        while (await watch.read()).status != status:
            pass


async def test_health_follows_the_workers():
    async with running() as cluster:
        health = health_pb2_grpc.HealthStub(cluster.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service="tandem.v1.GenerationService"))
        await follow(watch, SERVING)
        await crash(cluster.decodes[0])
        await follow(watch, NOT_SERVING)
        await cluster.add_decode("decode-1")
        await follow(watch, SERVING)
        watch.cancel()

        assert (await health.Check(health_pb2.HealthCheckRequest())).status == SERVING


async def test_reflection_lists_the_services():
    async with running() as cluster:
        stub = reflection_pb2_grpc.ServerReflectionStub(cluster.channel)
        call = stub.ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        response = await call.read()
        await call.done_writing()
        call.cancel()

        assert {service.name for service in response.list_services_response.service} == {
            "tandem.v1.BatchService",
            "tandem.v1.GenerationService",
            "tandem.v1.ModelService",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }


async def test_a_worker_that_cannot_start_leaves_nothing_running():
    with pytest.raises(ConfigError, match="100 bytes of KV cache hold no block"):
        async with running(config(cache={"decode_bytes": 100})):
            pass
