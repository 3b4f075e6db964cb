"""`tandem generate`: complete one prompt on the screen, or many from a file, in input order."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from deploy.access import Access, access_of
from deploy.commands.show import as_json, stream_text, summary
from deploy.embedded import EmbeddedService
from deploy.settings import load_config
from tandem.client import TandemClient
from tandem.config import ClusterConfig
from tandem.errors import ConfigError, TandemError
from tandem.sampling import SamplingParams
from tandem.speculation import SpeculationParams, parse_speculation

Prompt = str | list[int]
MAX_IN_FLIGHT = 256  # from one command; the server's queue is for others too
_SAMPLING = (
    *(
        "max_tokens",
        "min_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "seed",
        "n",
        "logprobs",
        "ignore_eos",
    ),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)


@dataclass(frozen=True, slots=True)
class Asking:
    """How all prompts of one command are completed."""

    sampling: SamplingParams
    speculation: SpeculationParams
    timeout_s: float | None = None

    def options(self) -> dict[str, Any]:
        """As keyword arguments of the client."""
        return {"sampling": self.sampling, "speculation": self.speculation, "timeout_s": self.timeout_s}


def asking_of(options: dict[str, Any]) -> Asking:
    """From the command's options. Raises `BAD_PARAM`."""
    speculation = parse_speculation(options["speculation"], options["num_assistant_tokens"])
    return Asking(sampling_of(options), speculation, options["timeout"])


def sampling_of(options: dict[str, Any]) -> SamplingParams:
    """The sampling parameters among a command's options. Raises `BAD_PARAM`."""
    lists: dict[str, Any] = {name: tuple(options[name] or ()) for name in ("stop", "stop_token_ids")}
    return SamplingParams(**{name: options[name] for name in _SAMPLING}, **lists)


def settings_of(options: dict[str, Any]) -> ClusterConfig | None:
    """Of the service to start; None if a running one is named."""
    if options["server"]:
        return None
    named = ("model", "draft", "device", "dtype", "quantization", "draft_quantization")
    return load_config(None, **{name: options[name] for name in named})


def read_prompts(prompts: Sequence[str], file: Path | None) -> list[Prompt]:
    """Prompts from the command line, then from the file. Raises `ConfigError` naming the bad line."""
    found: list[Prompt] = list(prompts)
    if file is not None:
        found += _read_file(file)
    if not found:
        raise ConfigError("no prompt; give one as an argument, or many with --prompt-file")
    return found


def _read_file(file: Path) -> list[Prompt]:
    try:
        data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        lines = data.decode("utf-8-sig").split("\n")
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text (byte {error.start})") from error
    numbered = [(number, line.rstrip("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered or not numbered[0][1].lstrip().startswith("{"):
        return [line for _, line in numbered]
    return [_parse(line, file, number) for number, line in numbered]


def _parse(line: str, file: Path, number: int) -> Prompt:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file}:{number}: not valid JSON: {error.msg} at column {error.colno}") from error
    prompt, token_ids = (
        (record.get("prompt"), record.get("token_ids")) if isinstance(record, dict) else (None, None)
    )
    if isinstance(prompt, str):
        return prompt
    if isinstance(token_ids, list) and all(type(t) is int and 0 <= t < 2**32 for t in token_ids):
        return token_ids
    raise ConfigError(f'{file}:{number}: needs "prompt" (a string) or "token_ids" (a list of token ids)')


def run_options(options: dict[str, Any]) -> int:
    """What the command line asks for; returns the exit code."""
    asking, access = asking_of(options), access_of(options)
    prompts = read_prompts(options["prompts"] or [], options["prompt_file"])
    return run(prompts, asking, access, settings_of(options), options["json_output"])


def run(
    prompts: list[Prompt],
    asking: Asking,
    access: Access,
    config: ClusterConfig | None,
    as_json_lines: bool,
) -> int:
    """Complete all prompts; returns the exit code: 1 if any of them failed."""
    return asyncio.run(_run(prompts, asking, access, config, as_json_lines))


async def _run(
    prompts: list[Prompt],
    asking: Asking,
    access: Access,
    config: ClusterConfig | None,
    as_json_lines: bool,
) -> int:
    err = Console(stderr=True, highlight=False, soft_wrap=True)
    async with _service(access.server, config, err) as address, access.client(address) as client:
        if len(prompts) == 1 and asking.sampling.n == 1 and not as_json_lines:
            finished = await stream_text(client, prompts[0], sys.stdout, **asking.options())
            err.print(f"[dim]{summary(finished)}[/]")
            return 0
        return await _many(client, prompts, asking, as_json_lines)


@asynccontextmanager
async def _service(server: str | None, config: ClusterConfig | None, err: Console) -> AsyncIterator[str]:
    """The address of the named service, or of one that lives as long as this block."""
    if server is not None:
        yield server
        return
    assert config is not None
    with err.status("starting an embedded service …"):
        service = await EmbeddedService(config).__aenter__()
    try:
        yield service.address
    finally:
        await service.__aexit__(None, None, None)


async def _many(
    client: TandemClient,
    prompts: list[Prompt],
    asking: Asking,
    as_json_lines: bool,
) -> int:
    """All at once, a bounded number in flight; printed in input order as soon as their turn comes."""
    slots = asyncio.Semaphore(MAX_IN_FLIGHT)

    async def one(prompt: Prompt) -> list[dict[str, Any]]:
        async with slots:
            try:
                response = await client.generate(prompt, **asking.options())
            except TandemError as error:
                return [{"error": {"reason": error.reason, "message": error.message}}]
        return [
            as_json(completion.text, completion.token_ids, completion.finished) | _logprobs(completion)
            for completion in response.completions
        ]

    tasks = [asyncio.create_task(one(prompt)) for prompt in prompts]
    num_failed = 0
    for prompt, task in zip(prompts, tasks, strict=True):
        for record in await task:
            num_failed += "error" in record
            print(json.dumps(record) if as_json_lines else _as_text(prompt, record), flush=True)
    return 1 if num_failed else 0


def _logprobs(completion: Any) -> dict[str, Any]:
    if not completion.logprobs:
        return {}
    return {
        "logprobs": [
            {"logprob": entry.logprob, "top": {top.token_id: top.logprob for top in entry.top}}
            for entry in completion.logprobs
        ]
    }


def _as_text(prompt: Prompt, record: dict[str, Any]) -> str:
    shown = prompt if isinstance(prompt, str) else f"[{len(prompt)} tokens] "
    if "error" in record:
        return f"── {shown[:60]!r}: error: {record['error']['reason']}: {record['error']['message']}"
    return f"──\n{shown}{record['text']}"
