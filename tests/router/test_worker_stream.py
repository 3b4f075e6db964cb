"""Orders to a worker: in order, each once, together where it understands that."""

from __future__ import annotations

import asyncio

import hypothesis.strategies as st
from hypothesis import given, settings

from router.prefill_link import no_prefill
from router.worker_stream import MOST_BUNDLED_BYTES, Heard, WorkerStream
from tandem.pb.worker.v1 import worker_pb2 as pb
from tests.serving import until


class Call:
    """A stream whose writes end when they are let. Nothing is ever read from it."""

    def __init__(self) -> None:
        self.written: list[pb.StreamPrefillRequest] = []
        self.may_end = asyncio.Semaphore(0)

    async def write(self, message: pb.StreamPrefillRequest) -> None:
        self.written.append(message)
        await self.may_end.acquire()

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> None:
        await asyncio.Event().wait()

    def cancel(self) -> None:
        """There is nothing behind it."""


def order(number: int, num_tokens: int = 1) -> pb.StreamPrefillRequest:
    return pb.StreamPrefillRequest(start=pb.Work(epoch=number, token_ids=[4000] * num_tokens))


def epochs(message: pb.StreamPrefillRequest) -> list[int]:
    assert not (message.orders and message.HasField("start"))
    return [each.start.epoch for each in message.orders or (message,)]


async def sent(sizes: list[int], *, takes_bundles: bool) -> list[pb.StreamPrefillRequest]:
    """What crosses when all orders but the first are given while that one is written."""
    call = Call()
    read, broken = lambda event: Heard(None, False), lambda: None
    stream = WorkerStream(lambda: call, read, no_prefill, broken, takes_bundles=takes_bundles)
    stream.send(order(0))
    await until(lambda: call.written)
    for number, size in enumerate(sizes, 1):
        stream.send(order(number, size))
    for _ in range(len(sizes) + 1):
        call.may_end.release()
    await until(lambda: sum(len(epochs(message)) for message in call.written) == len(sizes) + 1)
    await stream.close()
    return call.written


async def test_orders_that_wait_for_another_leave_in_one_message():
    written = await sent([1] * 5, takes_bundles=True)
    assert [epochs(message) for message in written] == [[0], [1, 2, 3, 4, 5]]


async def test_a_worker_of_the_version_before_gets_them_one_by_one():
    written = await sent([1] * 5, takes_bundles=False)
    assert [epochs(message) for message in written] == [[number] for number in range(6)]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from([1, 1000, 60_000, 140_000]), max_size=9))
def test_each_is_sent_once_in_order_and_no_message_outgrows_its_limit(sizes):
    written = asyncio.run(sent(sizes, takes_bundles=True))
    assert [epoch for message in written for epoch in epochs(message)] == list(range(len(sizes) + 1))
    for message in written:
        assert sum(each.ByteSize() for each in message.orders[:-1]) < MOST_BUNDLED_BYTES
