"""OpenVINO GenAI as a peer: a child process in the Python that has it, fed with the same prompts."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import peer_process
from bench.peer_process import PeerProcess, last_line
from bench.speculation.text import Tokens
from tandem.engine.native.build import cache_folder
from tandem.errors import ConfigError
from tandem.fingerprint import checkpoint_digest

CHILD = Path(__file__).with_name("child.py")
NEEDED = "it needs openvino-genai, and optimum-intel to convert the checkpoints"
EXPORT_TIMEOUT_S = 1800


@dataclass(frozen=True, slots=True)
class Pipeline:
    """One model as OpenVINO runs it."""

    target: Path  # a checkpoint of ours
    draft: Path | None = None
    bits: int = 16  # of the target's weights: 16 (as in the file), 8 or 4
    cache_gb: int = 0  # 0: the simple pipeline; more: continuous batching with so much KV


class OpenVino(PeerProcess):
    """Pipelines by name, in another process."""

    name = "OpenVINO GenAI"
    needed = NEEDED

    def complete(
        self, name: str, prompts: Sequence[Tokens], max_tokens: int, *, k: int = 0, together: bool = False
    ) -> tuple[float, list[list[int]]]:
        """Seconds and outputs, one prompt after the other or all at once; k = 0 drafts nothing.

        Raises `ConfigError` if the child has ended.
        """
        request = {"pipeline": name, "prompts": prompts, "max_tokens": max_tokens, "k": k}
        answer = self.ask(request | {"together": together})
        return float(answer["seconds"]), answer["outputs"]


@contextmanager
def running(python: Path, pipelines: Mapping[str, Pipeline], threads: int) -> Iterator[OpenVino]:
    """Raises `ConfigError` if the checkpoints cannot be converted by that Python."""
    wanted = {
        name: {
            "target": str(_converted(python, each.target, each.bits)),
            "draft": str(_converted(python, each.draft)) if each.draft else None,
            "cache_gb": each.cache_gb,
        }
        for name, each in pipelines.items()
    }
    settings = json.dumps({"threads": threads, "pipelines": wanted})
    with OpenVino.started(peer_process.command(python, CHILD, "serve", settings)) as peer:
        yield peer


def _converted(python: Path, checkpoint: Path, bits: int = 16) -> Path:
    """The checkpoint in OpenVINO's format: made once, kept in the user's cache by content."""
    place = cache_folder() / "openvino" / f"{checkpoint_digest(checkpoint).hex()[:16]}-{bits}"
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
            folder = Path(scratch) / "model"
            arguments = ("export", str(checkpoint), str(folder), str(bits))
            command = peer_process.command(python, CHILD, *arguments)
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=EXPORT_TIMEOUT_S, check=False
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise ConfigError(f"{python} cannot convert {checkpoint}: {error}; {NEEDED}") from error
            if done.returncode:
                raise ConfigError(f"{python} cannot convert {checkpoint}: {last_line(done.stderr)}; {NEEDED}")
            folder.rename(place)
    return place
