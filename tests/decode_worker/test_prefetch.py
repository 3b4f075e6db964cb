"""Blocks that were filled ahead of an order to decode: taken by it, or given back, whatever comes between."""

from __future__ import annotations

from dataclasses import replace

from tests.decode_worker.rig import decoding, make_order, store_kv, tokens_of
from tests.serving import greedy, prompt_of, until


async def ordered(rig):
    """An order to decode whose KV was ordered to be fetched before; from now on it may be followed."""
    rig.running.client._may_map = False
    order = make_order(max_tokens=8)
    handle = await store_kv(rig.running, order)
    rig.worker.prefetch(replace(order, token_ids=order.token_ids[:-1]), handle)
    return order, handle


async def test_what_was_fetched_ahead_is_decoded():
    async with decoding() as rig:
        order, handle = await ordered(rig)
        await until(lambda: rig.pool.audit().owned)
        rig.worker.start(order, handle, rig.client.emit)
        assert tokens_of(await rig.client.all()) == greedy(prompt_of(20), 8)[1:]


async def test_nobody_decodes_it():
    async with decoding() as rig:
        order, handle = await ordered(rig)
        await until(lambda: rig.pool.audit().owned)
        rig.worker.cancel_prefetch(order.key)
        await until(lambda: not rig.pool.audit().owned)
        await rig.running.client.release(handle)


async def test_an_order_that_is_cancelled_at_once_gives_it_back():
    async with decoding() as rig:
        order, handle = await ordered(rig)
        await until(lambda: rig.pool.audit().owned)
        rig.worker.cancel(rig.worker.start(order, handle, rig.client.emit))
        await until(lambda: not rig.pool.audit().owned and rig.worker.num_waiting == 0)
        await rig.running.client.release(handle)
