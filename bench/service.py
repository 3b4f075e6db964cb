"""The whole embedded service against transformers' `generate`, side by side in one run.

    python -m bench.service [--model PATH] [--draft PATH|none] [--repeats 5] [--json]

Both sides complete the same prompts greedily on the same two threads (Tandem: one for prefill, one for
decode), interleaved, and are compared by the median. The ratio is Tandem / transformers, in output
tokens per second. Knows nothing of how either side works.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench import greedy
from tandem.client import TandemClient
from tandem.config import BUNDLED_MODELS
from tandem.sampling import SamplingParams

PROMPT_TOKENS = 128
OUTPUT_TOKENS = 64
BATCHES = (1, 4, 8)
THREADS = 2


@dataclass(frozen=True, slots=True)
class Row:
    """One batch size. Rates are output tokens per second, medians over the repeats."""

    batch: int
    tandem_tokens_per_s: float
    transformers_tokens_per_s: float
    ratio: float


class Reference:
    """transformers on the same checkpoint, fp32, all threads."""

    def __init__(self, path: Path) -> None:
        torch.set_num_threads(THREADS)
        self._model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    def complete(self, prompts: Sequence[Sequence[int]]) -> float:
        """Output tokens per second for one batch of equal-length prompts."""
        began_s = time.perf_counter()
        greedy.complete(self._model, prompts, OUTPUT_TOKENS)
        return len(prompts) * OUTPUT_TOKENS / (time.perf_counter() - began_s)


async def complete(client: TandemClient, prompts: Sequence[Sequence[int]]) -> float:
    """Output tokens per second of the service for prompts sent together."""
    sampling = SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    began_s = time.perf_counter()
    await asyncio.gather(*(client.generate(prompt, sampling) for prompt in prompts))
    return len(prompts) * OUTPUT_TOKENS / (time.perf_counter() - began_s)


def prompts_of(path: Path, count: int) -> list[list[int]]:
    """`count` different prompts of `PROMPT_TOKENS` tokens from a standard library module."""
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    ids = tokenizer(Path(argparse.__file__).read_text())["input_ids"]
    return [ids[start : start + PROMPT_TOKENS] for start in range(0, count * PROMPT_TOKENS, PROMPT_TOKENS)]


@contextmanager
def serving(path: Path, draft: str, *options: str) -> Iterator[str]:
    """The address of a service started for this block by the command line."""
    command = [sys.executable, "-m", "deploy.cli", "serve", "--port", "0", "--http-port", "0", "--json"]
    process = subprocess.Popen(
        [*command, "--model", str(path), "--draft", draft, *options], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())["address"]
    finally:
        process.terminate()
        process.wait()


async def run(path: Path, draft: str, repeats: int) -> list[Row]:
    """Measure all batch sizes, both sides in turns."""
    reference = Reference(path)
    rows = []
    with serving(path, draft) as address:
        client = TandemClient(address)
        for batch in BATCHES:
            prompts = prompts_of(path, batch)
            ours, theirs = [], []
            for repeat in range(repeats + 1):  # the first is a warm-up
                pair = await complete(client, prompts), reference.complete(prompts)
                if repeat:
                    ours.append(pair[0])
                    theirs.append(pair[1])
            tandem, other = statistics.median(ours), statistics.median(theirs)
            rows.append(Row(batch, tandem, other, tandem / other))
            print(
                f"batch {batch}: {tandem:.0f} against {other:.0f} tokens/s, {tandem / other:.2f}x", flush=True
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=BUNDLED_MODELS / "target")
    parser.add_argument("--draft", default=str(BUNDLED_MODELS / "draft"), help="none for plain decoding")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    print(f"{PROMPT_TOKENS} tokens in, {OUTPUT_TOKENS} out, greedy, fp32, {THREADS} threads, medians")
    rows = asyncio.run(run(options.model, options.draft, options.repeats))
    if options.json:
        print(json.dumps({"rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
