"""Chunks lie behind each other, notes cover all of them, and what the store says of them is not lost."""

from __future__ import annotations

import asyncio

import pytest

from kvstore.placer import Placer
from kvstore.wire import decode, split
from tandem.errors import DataLoss
from tests.kvstore.samples import make_header, make_sample
from tests.kvstore.test_service import until

SAMPLE = make_sample(make_header(num_blocks=50, num_layers=2), blocks=1, layers=1)


class Store:
    """Takes notes, or refuses them."""

    def __init__(self, error: Exception | None = None) -> None:
        self.file = memoryview(bytearray(SAMPLE.header.most_message_bytes))
        self.notes: list[int] = []
        self._error = error

    async def tell(self, placed) -> None:
        await asyncio.sleep(0)
        if self._error:
            raise self._error
        self.notes.append(placed.end)


async def test_all_chunks_are_there_and_noted_in_few_notes():
    store = Store()
    placer = Placer(store.file, store.tell)
    for chunk in SAMPLE.chunks:
        await placer.write(*chunk)
    await placer.settle()
    assert [decode(message) for message in split(store.file[: store.notes[-1]])] == SAMPLE.chunks
    assert store.notes == sorted(set(store.notes))
    assert len(store.notes) < len(SAMPLE.chunks) / 2


async def test_a_chunk_is_noted_soon_though_no_other_follows():
    store = Store()
    placer = Placer(store.file, store.tell)
    for number in (1, 2, 3):
        await placer.write(*SAMPLE.chunks[number - 1])
        await until(lambda number=number: len(store.notes) == number)
        assert len(list(split(store.file[: store.notes[-1]]))) == number


@pytest.mark.parametrize("call", ["write", "settle"])
async def test_what_the_store_says_is_raised_by_a_later_call(call):
    placer = Placer(Store().file, Store(DataLoss()).tell)
    await placer.write(*SAMPLE.chunks[0])
    await until(lambda: placer._telling.done())
    with pytest.raises(DataLoss):
        await (placer.write(*SAMPLE.chunks[1]) if call == "write" else placer.settle())


async def test_who_leaves_says_nothing_more():
    store = Store()
    placer = Placer(store.file, store.tell)
    await placer.write(*SAMPLE.chunks[0])
    placer.close()
    await asyncio.sleep(0.02)
    assert store.notes == []
