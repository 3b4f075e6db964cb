"""A draft model whose prompts the prefill worker reads: its KV travels beside the target's, or does not."""

from contextlib import contextmanager
from pathlib import Path

import pytest

from tandem.config import ClusterConfig
from tandem.errors import ConfigError, Overloaded
from tests.checkpoints import tiny_llama
from tests.e2e.harness import (
    MIB,
    Result,
    ask,
    complete,
    config,
    crash,
    gated_reads,
    open_stream,
    quiesce,
    read_tokens,
    running,
    slow_steps,
    store_of,
    until,
)

pytestmark = pytest.mark.e2e

PROMPT = list(range(3, 130)) * 3  # longer than what a decode worker's draft reads in one step
SAMPLING = {"max_tokens": 24, "ignore_eos": True}
DRAFT = {"draft": "model", "draft_path": tiny_llama(), "num_assistant_tokens": 4}


def settings(where="prefill_worker", **parts):
    return config(speculation=DRAFT | {"draft_prefill": where}, **parts)


def draft_of(cluster):
    return cluster.decodes[0].worker._decoder._draft


async def same_as_plain(cluster):
    """The completion, whose tokens must be those of a service without speculation."""
    result = await complete(cluster, ask(PROMPT, **SAMPLING))
    async with running() as plain:
        assert result.token_ids == (await complete(plain, ask(PROMPT, **SAMPLING))).token_ids
    return result


async def test_the_draft_starts_at_once_with_kv_of_the_prefill_worker():
    async with running(settings()) as cluster:
        result = await same_as_plain(cluster)
        assert draft_of(cluster).catch_up_s == 0
        assert result.finished.usage.accepted > 15, "the draft is the target itself"


async def test_by_default_the_decode_worker_reads_the_prompt_for_its_draft():
    async with running(settings("decode_worker")) as cluster:
        await same_as_plain(cluster)
        assert draft_of(cluster).catch_up_s > 0
        assert cluster.prefills[0].worker._runner._draft is None


@contextmanager
def failing(owner, name, only):
    """The method raises for arguments that `only` picks."""
    original = getattr(owner, name)

    def call(*args, **kwargs):
        if only(*args, **kwargs):
            raise Overloaded("STORE_FULL", "the store is full")
        return original(*args, **kwargs)

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, original)


async def catches_up(cluster):
    """Tokens are right, and the decode worker's draft has read the prompt by itself."""
    await same_as_plain(cluster)
    assert draft_of(cluster).catch_up_s > 0


async def test_a_draft_that_fails_costs_its_kv_only():
    async with running(settings()) as cluster:
        draft = cluster.prefills[0].worker._runner._draft
        with failing(draft, "forward", lambda batch: True):
            await catches_up(cluster)


async def test_a_draft_that_computes_no_numbers_costs_its_kv_only():
    async with running(settings()) as cluster:
        cache = cluster.prefills[0].worker._runner._draft.cache
        forward = cluster.prefills[0].worker._runner._draft.forward

        def spoil(batch):
            forward(batch)
            cache.write_blocks([0], b"\xff\xff\xff\xff" * (cache.block_bytes // 4))

        cluster.prefills[0].worker._runner._draft.forward = spoil
        await catches_up(cluster)


async def test_a_store_without_room_for_the_drafts_kv_costs_nothing_else():
    async with running(settings()) as cluster:
        store, sizes = store_of(cluster), []

        def is_second(header, *rest):
            sizes.append(header.num_tokens)
            return len(sizes) == 2

        with failing(store, "reserve", is_second):
            await catches_up(cluster)
        assert sizes == [len(PROMPT)] * 2


async def test_damaged_kv_of_the_draft_is_not_used():
    async with running(settings()) as cluster:
        store, reads = store_of(cluster), []
        original = store.read

        def read(lease):
            messages = list(original(lease))
            reads.append(lease)
            if len(reads) == 2:
                damaged = bytearray(messages[1])
                damaged[-7] ^= 0x10
                messages[1] = bytes(damaged)
            yield from messages

        store.read = read
        await catches_up(cluster)
        assert len(reads) == 2


async def test_both_objects_are_given_up_when_nobody_fetches_them():
    """A request cancelled before its KV was read; the harness finds what is left over."""
    async with running(settings()) as cluster:
        with gated_reads(cluster.decodes[0], before=True) as gate:
            call = open_stream(cluster, ask(PROMPT, **SAMPLING))
            await until(lambda: gate.num_arrived == 1)
            assert len(store_of(cluster).audit().owners) == 2
            call.cancel()


async def test_a_lost_decode_worker_is_replaced_with_a_fresh_pair_of_objects():
    async with running(settings(), num_decode=2) as cluster:
        message = ask(PROMPT, **{**SAMPLING, "max_tokens": 60})
        with slow_steps(cluster.decodes[0]), slow_steps(cluster.decodes[1]):
            call, result = open_stream(cluster, message), Result()
            await read_tokens(call, result, 5)
            worker = next(d for d in cluster.decodes if d.worker.num_running)
            await crash(worker)
            await read_tokens(call, result, 60)
        async with running() as plain:
            assert result.token_ids == (await complete(plain, message)).token_ids


def test_the_store_is_asked_for_room_for_both():
    from router.needs import needs_of
    from tandem.geometry import ModelGeometry
    from tandem.request import Request
    from tandem.sampling import SamplingParams

    geometry = ModelGeometry.from_path(tiny_llama())
    request = Request(
        request_id="r",
        token_ids=tuple(PROMPT),
        num_prompt_tokens=len(PROMPT),
        sampling=SamplingParams(),
        max_tokens=8,
        seed=1,
        deadline_s=1e9,
    )
    alone = needs_of(request, geometry, 16, "float32", draft=geometry)
    both = needs_of(request, geometry, 16, "float32", draft=geometry, stores_draft=True)
    assert both.store_bytes == 2 * alone.store_bytes
    assert both.decode_bytes == alone.decode_bytes


@pytest.mark.parametrize(
    ("speculation", "message"),
    [
        ({"draft": "ngram", "draft_prefill": "prefill_worker"}, "is for a draft model, not for draft ngram"),
        ({"draft": "model", "draft_path": Path("x"), "draft_prefill": "router"}, "must be decode_worker or"),
    ],
)
def test_settings_that_cannot_work_are_refused(speculation, message):
    with pytest.raises(ConfigError, match=message):
        ClusterConfig.from_dict({"speculation": speculation})


async def test_a_draft_reads_a_restored_beginning_by_itself():
    """Cached pieces are the target's: behind a hit no draft's KV is sent; the decode worker's draft reads."""
    cached = {"cache": {"prefix_bytes": 4 * MIB}, "kvstore": {"prefix_tokens": 32}}
    async with running(settings(**cached)) as cluster:
        cold = await same_as_plain(cluster)
        assert draft_of(cluster).catch_up_s == 0
        await quiesce(cluster)
        sealed = store_of(cluster).counters.sealed
        warm = await same_as_plain(cluster)
        assert draft_of(cluster).catch_up_s > 0
        assert store_of(cluster).counters.sealed == sealed + 1, "the target's KV and nothing else"
    assert (cold.finished.usage.cached, warm.finished.usage.cached) == (0, (len(PROMPT) - 1) // 32 * 32)
    assert warm.finished.usage.prompt == cold.finished.usage.prompt == len(PROMPT)
    assert warm.finished.usage.accepted > 15, "once it has caught up the draft is as good as ever"
