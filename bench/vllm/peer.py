"""vLLM as a peer: a child process in the Python that has it, fed with the same prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import peer_process
from bench.peer_process import PeerProcess
from bench.speculation.text import Tokens

CHILD = Path(__file__).with_name("child.py")


@dataclass(frozen=True, slots=True)
class Settings:
    """One engine. `max_tokens` are those of a prompt with its output."""

    model: str  # a checkpoint's folder
    threads: int
    max_sequences: int
    max_tokens: int
    dtype: str = "float32"
    cache_gb: int = 2


class VLlm(PeerProcess):
    """An engine in another process."""

    name = "vLLM"
    needed = "it needs vllm, in a build for this machine's processor"

    def complete(self, prompts: Sequence[Tokens], max_tokens: int) -> tuple[float, list[list[int]]]:
        """Seconds and outputs of all prompts at once. Raises `ConfigError` if the child has ended."""
        answer = self.ask({"prompts": prompts, "max_tokens": max_tokens})
        return float(answer["seconds"]), answer["outputs"]


@contextmanager
def running(python: Path, settings: Settings) -> Iterator[VLlm]:
    """An engine that loads its model when it is first asked. Raises `ConfigError` for no such Python."""
    with VLlm.started(peer_process.command(python, CHILD, json.dumps(asdict(settings)))) as peer:
        yield peer
