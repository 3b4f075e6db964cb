"""Clients' files on disk: what they upload, and the results of their batches.

A file is two: `ID.data`, and `ID.json`, which says whose it is and is written last. So a crash leaves a
file that is whole or none, and what is left of none is removed at the next start. All calls block.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tandem.config import BatchConfig
from tandem.errors import InvalidRequest, NotFound, Overloaded, Unavailable
from tandem.offline.journal import replace_file

UPLOADED, RESULTS = "batch", "batch_output"  # purposes
MAX_NAME = 255  # characters of a file's name


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a tenant."""

    id: str
    tenant: str
    name: str  # what its owner calls it; never a path here
    purpose: str
    num_bytes: int
    created_s: int  # wall clock

    def to_json(self) -> dict[str, Any]:
        """OpenAI's file object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.num_bytes,
            "created_at": self.created_s,
            "expires_at": None,
            "filename": self.name,
            "purpose": self.purpose,
            "status": "processed",
        }


class FileStore:
    """The files of all tenants in one folder, which nobody else writes."""

    def __init__(self, folder: Path, limits: BatchConfig) -> None:
        self._folder = folder
        self._limits = limits
        self._files: dict[str, StoredFile] = {}
        self._uploading: Counter[str] = Counter()  # bytes by tenant, of what is not a file yet
        self._books = threading.Lock()
        folder.mkdir(mode=0o700, exist_ok=True)
        for path in folder.glob("*.json"):
            file = StoredFile(**json.loads(path.read_text()))
            self._files[file.id] = file
        for path in folder.iterdir():
            if path.suffix != ".json" and path.stem not in self._files:
                path.unlink()

    def of(self, tenant: str) -> list[StoredFile]:
        """Newest first."""
        files = [file for file in list(self._files.values()) if file.tenant == tenant]
        return sorted(files, key=lambda file: file.created_s)[::-1]

    def get(self, tenant: str, file_id: str) -> StoredFile:
        """Raises `NO_SUCH_FILE`, for another's as well."""
        file = self._files.get(file_id)
        if file is None or file.tenant != tenant:
            raise NotFound("NO_SUCH_FILE", "not found")
        return file

    def path(self, file: StoredFile) -> Path:
        return self._folder / f"{file.id}.data"

    def delete(self, file: StoredFile) -> None:
        """A batch that runs from it runs on: it has a link of its own."""
        del self._files[file.id]
        (self._folder / f"{file.id}.json").unlink()
        self.path(file).unlink()

    def upload(self, tenant: str) -> Upload:
        """Begin a file. Raises `TENANT_QUOTA`."""
        if len(self.of(tenant)) >= self._limits.max_tenant_files:
            raise too_much(f"your limit of {self._limits.max_tenant_files} files is reached; delete some")
        return Upload(self, tenant, self._folder / f"file-{secrets.token_hex(12)}.data")

    def adopt(self, tenant: str, file_id: str, data: Path, name: str) -> None:
        """Keep results under a name that the caller chose; done again, nothing changes."""
        path = self._folder / f"{file_id}.data"
        path.unlink(missing_ok=True)
        os.link(data, path)
        self._keep(StoredFile(file_id, tenant, name, RESULTS, path.stat().st_size, int(time.time())))

    def charge(self, tenant: str, file_bytes: int, num_bytes: int) -> None:
        """Count what an upload of `file_bytes` so far writes next. Raises `BAD_PARAM`, `TENANT_QUOTA`."""
        limits = self._limits
        if file_bytes + num_bytes > limits.max_file_bytes:
            raise InvalidRequest("BAD_PARAM", f"`file` is larger than {limits.max_file_bytes} bytes")
        with self._books:
            used = sum(file.num_bytes for file in self.of(tenant)) + self._uploading[tenant]
            if used + num_bytes > limits.max_tenant_bytes:
                raise too_much(
                    f"your limit of {limits.max_tenant_bytes} bytes of files is reached; delete some"
                )
            self._uploading[tenant] += num_bytes

    def settle(self, tenant: str, num_bytes: int, file: StoredFile | None) -> None:
        """An upload is over: it is a file now, or its bytes are free again."""
        with self._books:
            self._uploading[tenant] -= num_bytes
            if file is not None:
                self._keep(file)

    def _keep(self, file: StoredFile) -> None:
        replace_file(self._folder / f"{file.id}.json", json.dumps(asdict(file)))
        self._files[file.id] = file


class Upload:
    """A file that is being written. It is one of the tenant's only after `commit`."""

    def __init__(self, store: FileStore, tenant: str, path: Path) -> None:
        self._store = store
        self._tenant = tenant
        self._path = path
        self._num_bytes = 0
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        self._is_over = False

    def write(self, data: bytes) -> None:
        """Raises `BAD_PARAM`, `TENANT_QUOTA` or, where the disk does not take it, `STORE_DOWN`."""
        self._store.charge(self._tenant, self._num_bytes, len(data))
        self._num_bytes += len(data)
        with disk_errors():
            while data:
                data = data[os.write(self._fd, data) :]

    def commit(self, name: str) -> StoredFile:
        """On disk before it is there."""
        with disk_errors():
            os.fsync(self._fd)
            file = StoredFile(
                self._path.stem, self._tenant, name[:MAX_NAME], UPLOADED, self._num_bytes, int(time.time())
            )
            self._close(file)
        return file

    def abandon(self) -> None:
        """Nothing was uploaded; without effect after `commit`."""
        if not self._is_over:
            self._close(None)
            self._path.unlink()

    def _close(self, file: StoredFile | None) -> None:
        self._is_over = True
        os.close(self._fd)
        self._store.settle(self._tenant, self._num_bytes, file)


@contextmanager
def disk_errors() -> Iterator[None]:
    """What the disk does not take is told without its path."""
    try:
        yield
    except OSError as error:
        raise Unavailable(
            "STORE_DOWN", "the service cannot write files now", retry_after_ms=30_000
        ) from error


def too_much(message: str) -> Overloaded:
    return Overloaded("TENANT_QUOTA", message, retry_after_ms=60_000)
