"""An embedded service on the bundled model with settings of its own, as a process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Embedded:
    """A service that runs: where it listens, and the process whose children it is made of."""

    address: str
    internal_address: str
    http_url: str
    pid: int


def last_words(text: str) -> str:
    """Why a service left: its own reason, behind what one of its processes last said."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(lines[-2:]) or "it said nothing"


def models_of(target: Path, draft: Path | None, quantization: str = "none") -> dict[str, Any]:
    """The part of a configuration that names models."""
    speculation = {"draft": "model", "draft_path": str(draft)} if draft else {"draft": "none"}
    return {"model": {"path": str(target), "quantization": quantization}, "speculation": speculation}


@contextmanager
def serving(values: Mapping[str, Any]) -> Iterator[str]:
    """Its gRPC address. Raises `ConfigError` if it does not start."""
    with started(values) as service:
        yield service.address


@contextmanager
def started(values: Mapping[str, Any]) -> Iterator[Embedded]:
    """The service until the block ends. Raises `ConfigError` if it does not start."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "settings.json"  # which is YAML too
        settings.write_text(json.dumps(values))
        command = [sys.executable, "-m", "deploy.cli", "serve", "--port", "0", "--http-port", "0", "--json"]
        said = Path(folder) / "stderr"
        with said.open("w") as stderr:
            process = subprocess.Popen(
                [*command, "--config", str(settings)], stdout=subprocess.PIPE, stderr=stderr, text=True
            )
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                raise ConfigError(f"the service did not start: {last_words(said.read_text())}")
            facts = json.loads(line)
            http_url = f"http://{facts['http_address']}"
            yield Embedded(facts["address"], facts["internal_address"], http_url, process.pid)
        finally:
            process.terminate()
            process.wait()
            process.stdout.close()
