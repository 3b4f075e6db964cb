"""The README's code blocks run as they stand: bash blocks by bash, Python blocks by Python."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_readme_has_blocks_to_run() -> None:
    assert {kind for kind, _ in BLOCKS} == {"bash", "python"}


@pytest.mark.e2e
@pytest.mark.parametrize(("kind", "code"), BLOCKS)
def test_block_runs(kind: str, code: str, tmp_path: Path) -> None:
    bin_folder = Path(sys.executable).parent
    command = ["bash", "-euo", "pipefail", "-c", code] if kind == "bash" else [sys.executable, "-c", code]
    environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
