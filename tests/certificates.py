"""Certificates for tests, made by openssl when first asked for and valid for a day."""

from __future__ import annotations

import functools
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Certificate:
    cert: Path
    key: Path


@functools.cache
def self_signed(name: str = "server", good_for: str = "IP:127.0.0.1,DNS:localhost") -> Certificate:
    """For 127.0.0.1 and localhost; its own authority."""
    folder = Path(tempfile.mkdtemp(prefix="tandem-test-"))
    made = Certificate(folder / f"{name}.pem", folder / f"{name}.key")
    subprocess.run(
        [
            *(
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-nodes",
            ),
            *("-keyout", str(made.key), "-out", str(made.cert), "-days", "1", "-subj", f"/CN={name}"),
            *("-addext", f"subjectAltName={good_for}"),
        ],
        check=True,
        capture_output=True,
    )
    return made
