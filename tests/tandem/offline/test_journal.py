"""Records and the files they are in: whatever is cut off or damaged, no whole record is lost."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.errors import ConfigError
from tandem.offline import journal as journal_module
from tandem.offline.journal import Journal, StorageError, sealed_records
from tandem.offline.record import is_sealed, line_of, parse, seal

MEMBERS = st.dictionaries(
    st.text(min_size=1).filter(lambda name: name not in ("line", "crc32")),
    st.none() | st.integers() | st.text() | st.lists(st.text(), max_size=3),
    max_size=4,
)
THREE = [seal(line, {"custom_id": f"c{line}", "text": "x\u2028\n\U0001f600"}) for line in (1, 7, 300)]


@given(st.integers(1, 2**40), MEMBERS)
def test_a_record_is_json_that_knows_its_line_and_its_checksum(line, members) -> None:
    sealed = seal(line, members)
    assert is_sealed(sealed)
    assert line_of(sealed) == line
    assert parse(sealed) == {"line": line, **members}
    assert sealed.count(b"\n") == 1
    assert {"line": line, **members}.items() <= json.loads(sealed).items()


@given(st.integers(1, 2**40), MEMBERS, st.data())
def test_a_record_with_any_bit_changed_or_any_end_cut_is_none(line, members, data) -> None:
    sealed = seal(line, members)
    cut = data.draw(st.integers(0, len(sealed) - 1))
    assert not is_sealed(sealed[:cut])
    flipped = bytearray(sealed)
    flipped[cut] ^= 1 << data.draw(st.integers(0, 7))
    assert not is_sealed(bytes(flipped))


def test_a_file_cut_at_any_byte_keeps_every_whole_record(tmp_path: Path) -> None:
    whole, path = b"".join(THREE), tmp_path / "results.jsonl"
    ends = [0, len(THREE[0]), len(THREE[0]) + len(THREE[1]), len(whole)]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        seen: list[bytes] = []
        journal = Journal(path, seen.append)
        kept = max(end for end in ends if end <= cut)
        assert b"".join(seen) == path.read_bytes() == whole[:kept]
        assert journal.num_dropped == (kept != cut)
        journal.append(THREE[len(seen) :])
        journal.close()
        assert path.read_bytes() == whole


@pytest.mark.slow
def test_a_file_with_any_byte_changed_keeps_the_other_records_and_the_damaged_bytes(tmp_path: Path) -> None:
    whole, path = b"".join(THREE), tmp_path / "results.jsonl"
    owners = [index for index, sealed in enumerate(THREE) for _ in sealed]
    for place, owner in enumerate(owners):
        damaged = bytearray(whole)
        damaged[place] ^= 0x20
        path.write_bytes(damaged)
        Journal(path).close()
        # A newline that is gone joins two lines, so that neither can be read any more.
        lost = {owner, owner + 1} if whole[place] == ord("\n") else {owner}
        wanted = [sealed for index, sealed in enumerate(THREE) if index not in lost]
        assert path.read_bytes() == b"".join(wanted)
        assert [sealed for _, sealed in sealed_records(path)] == wanted
    assert (tmp_path / "results.jsonl.damaged").read_bytes()


def test_zeros_behind_the_last_record_are_cut_off(tmp_path: Path) -> None:
    """What some file systems leave behind a crash of the machine."""
    path = tmp_path / "results.jsonl"
    path.write_bytes(THREE[0] + bytes(4096))
    Journal(path).close()
    assert path.read_bytes() == THREE[0]


@pytest.mark.parametrize("taken", [0, 5])
def test_a_full_disk_leaves_whole_records_only(tmp_path: Path, monkeypatch, taken: int) -> None:
    path = tmp_path / "results.jsonl"
    journal = Journal(path)
    journal.append(THREE[:1])
    write, calls = os.write, []

    def full(fd: int, data: bytes) -> int:
        calls.append(data)
        if taken and len(calls) == 1:
            return write(fd, data[:taken])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(journal_module.os, "write", full)
    with pytest.raises(StorageError, match=r"No space left on device; make room there"):
        journal.append(THREE[1:])
    monkeypatch.undo()
    assert path.read_bytes() == THREE[0]
    journal.append(THREE[1:])
    assert path.read_bytes() == b"".join(THREE)
    journal.close()


def test_links_are_not_followed_and_others_cannot_read(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    link = tmp_path / "results.jsonl"
    link.symlink_to(target)
    with pytest.raises(ConfigError, match="it is a symbolic link"):
        Journal(link)
    assert target.read_bytes() == b"precious"
    Journal(tmp_path / "fresh.jsonl").close()
    assert (tmp_path / "fresh.jsonl").stat().st_mode & 0o777 == 0o600
