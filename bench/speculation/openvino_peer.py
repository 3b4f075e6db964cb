"""OpenVINO GenAI as a peer: a child process in the Python that has it, fed with the same prompts."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from bench.inflate import Pair
from bench.speculation.text import Tokens
from tandem.engine.native.build import cache_folder
from tandem.errors import ConfigError
from tandem.fingerprint import checkpoint_digest

CHILD = Path(__file__).with_name("openvino_child.py")
NEEDED = "it needs openvino-genai, and optimum-intel to convert the checkpoints"
EXPORT_TIMEOUT_S = 900
K = (3, 5)


class OpenVino:
    """Two pipelines, plain and speculative, in another process."""

    def __init__(self, child: subprocess.Popen[str], errors: IO[str]) -> None:
        self._child = child
        self._errors = errors

    def complete(self, prompts: Sequence[Tokens], max_tokens: int, k: int) -> float:
        """Output tokens per second, one prompt after the other; k = 0 is plain decoding.

        Raises `ConfigError` if the child has ended.
        """
        answer = self._ask({"prompts": prompts, "max_tokens": max_tokens, "k": k})
        return sum(len(output) for output in answer["outputs"]) / float(answer["seconds"])

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with suppress(BrokenPipeError):  # its end shows below
            self._child.stdin.write(json.dumps(request) + "\n")
            self._child.stdin.flush()
        line = self._child.stdout.readline()
        if not line:
            self._child.wait()
            self._errors.seek(0)
            raise ConfigError(f"OpenVINO GenAI ended: {_last_line(self._errors.read())}; {NEEDED}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def running(python: Path, pair: Pair, threads: int) -> Iterator[OpenVino]:
    """Raises `ConfigError` if the checkpoints cannot be converted by that Python."""
    folders = [_converted(python, path) for path in pair]
    command = [str(part) for part in (python, "-I", CHILD, "serve", *folders, threads)]
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True) as child,
    ):
        try:
            yield OpenVino(child, errors)
        finally:
            child.kill()


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1]


def _converted(python: Path, checkpoint: Path) -> Path:
    """The checkpoint in OpenVINO's format: made once, kept in the user's cache by content."""
    place = cache_folder() / "openvino" / checkpoint_digest(checkpoint).hex()[:16]
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
            folder = Path(scratch) / "model"
            command = [str(part) for part in (python, "-I", CHILD, "export", checkpoint, folder)]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=EXPORT_TIMEOUT_S, check=False
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise ConfigError(f"{python} cannot convert {checkpoint}: {error}; {NEEDED}") from error
            if done.returncode:
                raise ConfigError(
                    f"{python} cannot convert {checkpoint}: {_last_line(done.stderr)}; {NEEDED}"
                )
            folder.rename(place)
    return place
