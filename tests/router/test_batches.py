"""Batches on disk without a service: what a crash or a late cancel leaves."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from router.batches.batch import TRANSITIONS, Batch, BatchStatus
from router.batches.book import BatchBook
from router.batches.files import FileStore
from router.batches.pulse import Pulse
from router.batches.run import BatchRun, Model
from tandem.config import BatchConfig
from tandem.errors import NotFound, Overloaded
from tandem.offline.results import Results

LIMITS = BatchConfig(max_tenant_files=3)


@pytest.fixture
def files(tmp_path):
    return FileStore(tmp_path / "files", LIMITS)


@pytest.fixture
def book(tmp_path, files):
    return BatchBook(tmp_path / "batches", files, 3)


def upload(files, data: bytes = b"{}\n"):
    begun = files.upload("t")
    begun.write(data)
    return begun.commit("requests.jsonl")


def batch_of(file_id: str, number: int = 0, status: BatchStatus = BatchStatus.VALIDATING) -> Batch:
    entered_s = {BatchStatus.VALIDATING.value: number}
    made = Batch(f"batch_{number}", "t", "/v1/completions", "24h", int(time.time()) + 99, entered_s, file_id)
    return replace(made, status=status)


async def test_a_batch_that_was_cancelled_while_it_expired_keeps_its_results(book, files):
    batch = batch_of(upload(files).id, status=BatchStatus.IN_PROGRESS)
    book.add(batch)
    results = Results(book.output(batch))
    await results.add(1, {"custom_id": "a"})
    await results.close()
    run = BatchRun(batch, book, None, Model("m", "f"), LIMITS, 1, Pulse())
    assert await run.enter(BatchStatus.CANCELLING)
    await run._end(BatchStatus.EXPIRED)
    assert run.batch.status is BatchStatus.CANCELLING
    assert book.output(batch).exists()
    await run.run()
    ended = book.get("t", batch.id)
    assert ended.status is BatchStatus.CANCELLED
    assert b'"custom_id":"a"' in files.path(files.get("t", ended.output_file_id)).read_bytes()
    assert not book.output(batch).exists()


def test_what_a_crash_left_half_done_is_nothing(tmp_path, files, book):
    kept = upload(files)
    files.upload("t").write(b"half")
    (tmp_path / "batches" / "batch_9").mkdir()
    again = FileStore(tmp_path / "files", LIMITS)
    assert again.of("t") == [kept]
    assert {path.suffix for path in (tmp_path / "files").iterdir()} == {".data", ".json"}
    assert len(list((tmp_path / "files").iterdir())) == 2
    assert BatchBook(tmp_path / "batches", again, 3).all() == []
    assert not (tmp_path / "batches" / "batch_9").exists()


def test_a_batch_runs_on_when_its_file_is_deleted_and_comes_back_as_it_was(tmp_path, files, book):
    file = upload(files, b'{"prompt": "x"}\n')
    batch = batch_of(file.id)
    book.add(batch)
    files.delete(file)
    with pytest.raises(NotFound):
        files.get("t", file.id)
    again = BatchBook(tmp_path / "batches", files, 3)
    assert again.all() == [batch]
    assert again.input(batch).read_bytes() == b'{"prompt": "x"}\n'


def test_the_oldest_that_have_ended_are_forgotten_and_open_ones_have_a_limit(book, files):
    file = upload(files)
    for number in range(5):
        book.add(batch_of(file.id, number, BatchStatus.COMPLETED))
    assert [batch.id for batch in book.all()] == ["batch_2", "batch_3", "batch_4"]
    for number in range(5, 8):
        book.add(batch_of(file.id, number))
    assert [batch.id for batch in book.all()] == ["batch_5", "batch_6", "batch_7"]
    with pytest.raises(Overloaded, match="3 unfinished batches"):
        book.add(batch_of(file.id, 8))


def test_every_status_leads_to_an_end_and_ends_lead_nowhere():
    for status in BatchStatus:
        assert status.has_ended != (status in TRANSITIONS)
        seen, following = set(), {status}
        while following:
            seen |= following
            following = {after for one in following for after in TRANSITIONS.get(one, ())} - seen
        assert any(one.has_ended for one in seen)
