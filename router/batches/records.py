"""Reading the records of a batch, while it runs and when it has ended."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from router.batches.batch import Batch
from router.batches.book import BatchBook
from router.batches.files import FileStore
from tandem.errors import NotFound
from tandem.offline.record import is_sealed, parse
from tandem.offline.results import error_path
from tandem.sampling import bad_param

MAX_RECORDS = 64  # read at once


def places(batch: Batch, book: BatchBook, files: FileStore) -> tuple[Path | None, Path | None]:
    """Where answers and failures lie now; None for what there is not, or no more."""
    if not batch.status.has_ended:
        output = book.output(batch)
        return output, error_path(output)

    def path_of(file_id: str) -> Path | None:
        try:
            return files.path(files.get(batch.tenant, file_id)) if file_id else None
        except NotFound:
            return None

    return path_of(batch.output_file_id), path_of(batch.error_file_id)


def read_on(path: Path | None, offset: int) -> tuple[list[tuple[int, dict[str, Any]]], int]:
    """Some whole records behind `offset`, each with the offset behind it, and the last of those offsets.

    Nothing is left, for now, if that is the offset itself. Raises `BAD_PARAM` for an offset inside a record.
    """
    records: list[tuple[int, dict[str, Any]]] = []
    if path is None or not path.exists():
        return records, offset
    with path.open("rb") as file:
        file.seek(max(offset - 1, 0))
        if offset and file.read(1) != b"\n":
            raise bad_param("`resume_token` must be one of an earlier result")
        for line in itertools.islice(file, MAX_RECORDS):
            if not is_sealed(line):
                break
            offset += len(line)
            records.append((offset, parse(line)))
    return records, offset
