"""The batches of all tenants on disk: a folder each, with state, input and results. All calls block."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from router.batches.batch import Batch
from router.batches.files import FileStore, disk_errors, too_much
from tandem.errors import NotFound
from tandem.offline.journal import replace_file
from tandem.offline.results import error_path

STATE, INPUT, OUTPUT = "batch.json", "input.jsonl", "results.jsonl"


class BatchBook:
    """Every change is on disk before it is told. Nobody else writes the folder."""

    def __init__(self, folder: Path, files: FileStore, max_per_tenant: int) -> None:
        self._folder = folder
        self._files = files
        self._max_per_tenant = max_per_tenant
        self._batches: dict[str, Batch] = {}
        folder.mkdir(mode=0o700, exist_ok=True)
        for place in folder.iterdir():
            if (place / STATE).exists():
                batch = Batch.from_record(json.loads((place / STATE).read_text()))
                self._batches[batch.id] = batch
                if batch.status.has_ended:
                    self.clear(batch)
            else:
                shutil.rmtree(place)  # of a batch that was never told of

    def all(self) -> list[Batch]:
        """Oldest first; those of one second in the order they came."""
        return sorted(self._batches.values(), key=lambda batch: batch.created_s)

    def get(self, tenant: str, batch_id: str) -> Batch:
        """Raises `NO_SUCH_BATCH`, for another's as well."""
        batch = self._batches.get(batch_id)
        if batch is None or batch.tenant != tenant:
            raise NotFound("NO_SUCH_BATCH", "not found")
        return batch

    def output(self, batch: Batch) -> Path:
        """Where results are while the batch runs; failures lie beside them."""
        return self._folder / batch.id / OUTPUT

    def input(self, batch: Batch) -> Path:
        return self._folder / batch.id / INPUT

    def add(self, batch: Batch) -> None:
        """Keep a new batch. Raises `TENANT_QUOTA`, or `STORE_DOWN` where the disk does not take it."""
        num_open = sum(not known.status.has_ended for known in self._of(batch.tenant))
        if num_open >= self._max_per_tenant:
            raise too_much(f"your limit of {self._max_per_tenant} unfinished batches is reached")
        with disk_errors():
            (self._folder / batch.id).mkdir(mode=0o700)
            self.save(batch)
            self._forget_oldest(batch.tenant)

    def save(self, batch: Batch) -> None:
        """Replace what is kept. The input gets a link of its own, so that the file may be deleted."""
        path = self._folder / batch.id / STATE
        if batch.input_file_id and not batch.status.has_ended and not self.input(batch).exists():
            os.link(self._files.path(self._files.get(batch.tenant, batch.input_file_id)), self.input(batch))
        replace_file(path, json.dumps(batch.to_record()))
        self._batches[batch.id] = batch

    def publish(self, batch: Batch) -> dict[str, str]:
        """Make the results files of their owner; returns which field of the batch names which. Done again,
        nothing changes."""
        output = self.output(batch)
        named = {"output": output, "error": error_path(output)}
        found: dict[str, str] = {}
        for kind, path in named.items():
            if path.exists() and path.stat().st_size:
                digest = hashlib.sha256(f"{batch.id}:{kind}".encode()).hexdigest()
                found[f"{kind}_file_id"] = f"file-{digest[:24]}"
                self._files.adopt(batch.tenant, f"file-{digest[:24]}", path, f"{batch.id}_{kind}.jsonl")
        return found

    def clear(self, batch: Batch) -> None:
        """What an ended batch needs no more: its owner decides when the files go."""
        for path in (self._folder / batch.id).iterdir():
            if path.name != STATE:
                path.unlink()

    def _of(self, tenant: str) -> list[Batch]:
        return [batch for batch in self.all() if batch.tenant == tenant]

    def _forget_oldest(self, tenant: str) -> None:
        known = self._of(tenant)
        ended = [batch for batch in known if batch.status.has_ended]
        for batch in ended[: max(0, len(known) - self._max_per_tenant)]:
            del self._batches[batch.id]
            shutil.rmtree(self._folder / batch.id)
