"""vLLM as a peer: a child process in the Python that has it, fed with the same prompts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import peer_process
from bench.peer_process import PeerProcess
from bench.speculation.text import Tokens

CHILD = Path(__file__).with_name("child.py")
NEEDED = "it needs vllm, in a build for this machine's processor"
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # nothing must outlive whoever ends the child


@dataclass(frozen=True, slots=True)
class Settings:
    """One engine. `max_tokens` are those of a prompt with its output."""

    model: str  # a checkpoint's folder
    threads: int
    max_sequences: int
    max_tokens: int
    dtype: str = "float32"
    cache_gb: int = 2
    step_tokens: int | None = None  # most that one step computes; None: as vLLM has it


def environment(settings: Settings) -> dict[str, str]:
    """What vLLM reads when it is imported: its threads, on the first of our cores, and its KV memory."""
    cores = sorted(os.sched_getaffinity(0))[: settings.threads]
    return {
        "OMP_NUM_THREADS": str(settings.threads),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": str(settings.cache_gb),
        "VLLM_NO_USAGE_STATS": "1",
    }


class VLlm(PeerProcess):
    """An engine in another process."""

    name = "vLLM"
    needed = NEEDED

    def complete(self, prompts: Sequence[Tokens], max_tokens: int) -> tuple[float, list[list[int]]]:
        """Seconds and outputs of all prompts at once. Raises `ConfigError` if the child has ended."""
        answer = self.ask({"prompts": prompts, "max_tokens": max_tokens})
        return float(answer["seconds"]), answer["outputs"]


@contextmanager
def running(python: Path, settings: Settings) -> Iterator[VLlm]:
    """An engine that loads its model when it is first asked. Raises `ConfigError` for no such Python."""
    command = peer_process.command(python, CHILD, json.dumps(asdict(settings)))
    with VLlm.started(command, environment(settings) | ONE_PROCESS) as peer:
        yield peer
