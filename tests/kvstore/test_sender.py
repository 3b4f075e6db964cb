"""One chunk is on its way while the next is made ready; what the store says of it is not lost."""

from __future__ import annotations

import asyncio

import pytest

from kvstore.sender import Sender
from kvstore.wire import decode
from tandem.errors import DataLoss, TandemError
from tests.kvstore.samples import make_sample
from tests.kvstore.test_service import PAYLOAD, big, make_ranges, serving

CHUNKS = make_sample(blocks=1, layers=1).chunks


async def test_the_next_chunk_is_made_ready_while_one_is_sent():
    started, may_end = [], asyncio.Event()

    async def send(message):
        started.append(message)
        await may_end.wait()

    sender = Sender(send)
    await asyncio.wait_for(sender.write(*CHUNKS[0]), 1)
    second = asyncio.create_task(sender.write(*CHUNKS[1]))
    await asyncio.sleep(0.01)
    assert len(started) == 1
    assert not second.done()
    may_end.set()
    await second
    await sender.settle()
    assert [decode(message) for message in started] == CHUNKS[:2]


async def test_a_payload_may_be_changed_after_the_write():
    sent = []

    async def send(message):
        await asyncio.sleep(0)
        sent.append(message)

    sender, (chunk, payload) = Sender(send), CHUNKS[0]
    buffer = bytearray(payload)
    await sender.write(chunk, buffer)
    buffer[:] = bytes(len(buffer))
    await sender.settle()
    assert decode(sent[0]) == (chunk, payload)


async def test_what_the_store_says_is_raised_by_the_next_call():
    async def send(message):
        raise DataLoss

    for call in ("write", "settle"):
        sender = Sender(send)
        await sender.write(*CHUNKS[0])
        with pytest.raises(DataLoss):
            await (sender.write(*CHUNKS[1]) if call == "write" else sender.settle())


async def test_a_refused_chunk_reaches_its_writer_at_the_seal(monkeypatch):
    header = big(1)
    async with serving() as service, service.client() as client:
        async with client.put(header) as writer:
            monkeypatch.setattr(writer._digest, "chunk", lambda *_: bytes(16))
            await writer.write(make_ranges(header, blocks=1)[0], PAYLOAD)
            with pytest.raises(TandemError, match="KV_CORRUPT"):
                await writer.seal()
        assert service.store.audit().is_empty
