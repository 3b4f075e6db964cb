"""An embedded service on the bundled model with settings of its own, as a process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tandem.errors import ConfigError


@contextmanager
def serving(values: Mapping[str, Any]) -> Iterator[str]:
    """Its gRPC address. Raises `ConfigError` if it does not start."""
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
                raise ConfigError(f"the service did not start: {said.read_text().strip()}")
            yield json.loads(line)["address"]
        finally:
            process.terminate()
            process.wait()
            process.stdout.close()
