"""What is asked: synthetic prompts, or those of a file whose format is told from its content.

| file | taken from it |
|---|---|
| Mooncake trace, JSONL | `timestamp` (ms), `input_length`, `output_length`, `hash_ids`, of equal blocks |
| ShareGPT, JSON | the human turns of each conversation, or the first; the answers' lengths bound the output |
| requests, JSONL | OpenAI Batch lines, `{"prompt": …}`, `{"token_ids": […]}` |
| plain text | one prompt a line |
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.errors import ConfigError
from tandem.offline.lines import COMPLETIONS, BadLine, LineParser, is_plain_text, read_entries

Prompt = str | list[int]
SNIFFED_BYTES = 1 << 20
MOONCAKE_BLOCK = 512  # tokens of one hash id
CHARS_PER_TOKEN = 4  # of a ShareGPT answer, whose tokens nobody has counted


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """One request to send, and what follows it. `at_s` is when a trace says it came."""

    prompt: Prompt
    max_tokens: int
    at_s: float | None = None
    ignore_eos: bool = True
    request_class: str = ""
    session: str = ""  # the conversation that it is a turn of
    then: LoadRequest | None = None  # the next turn: its prompt is only what is said anew
    think_s: float = 0.0  # from the end of the turn before
    is_cut: bool = False  # to the model's context: the file has a longer prompt or output

    @property
    def num_turns(self) -> int:
        return 1 + (self.then.num_turns if self.then else 0)


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of token counts: `128`, `uniform:16-512`, `lognormal:256,0.6` (median, sigma), or
    `mix:96*4,1536` (counts with weights)."""

    text: str

    def draw(self, rng: random.Random) -> int:
        """At least one token. Raises `ConfigError` if the text is no distribution."""
        kind, _, figures = self.text.rpartition(":")
        try:
            match kind:
                case "":
                    return max(int(figures), 1)
                case "uniform":
                    low, high = figures.split("-")
                    return rng.randint(max(int(low), 1), int(high))
                case "mix":
                    parts = [part.split("*") for part in figures.split(",")]
                    weights = [float(part[1]) if len(part) > 1 else 1.0 for part in parts]
                    return max(rng.choices([int(part[0]) for part in parts], weights)[0], 1)
                case "lognormal":
                    median, sigma = figures.split(",")
                    return max(round(float(median) * rng.lognormvariate(0, float(sigma))), 1)
        except ValueError:
            pass
        known = "128, uniform:16-512, lognormal:256,0.6 or mix:96*4,1536"
        raise ConfigError(f"lengths must be like {known}; not {self.text}")


@dataclass(frozen=True, slots=True)
class Synthetic:
    """Random token ids. A share of every prompt is one of `num_prefixes` shared beginnings."""

    input_lengths: Lengths
    output_lengths: Lengths
    vocab_size: int
    max_context: int
    prefix_share: float = 0.0
    num_prefixes: int = 1

    def requests(self, count: int, seed: int) -> list[LoadRequest]:
        rng = random.Random(seed)
        prefixes = [
            self._tokens(random.Random(f"{seed}/{number}"), self.max_context)
            for number in range(self.num_prefixes)
        ]
        return [self._request(rng, rng.choice(prefixes)) for _ in range(count)]

    def _request(self, rng: random.Random, prefix: list[int]) -> LoadRequest:
        num_output = min(self.output_lengths.draw(rng), self.max_context - 1)
        num_prompt = min(self.input_lengths.draw(rng), self.max_context - num_output)
        num_shared = int(num_prompt * self.prefix_share)
        return LoadRequest(prefix[:num_shared] + self._tokens(rng, num_prompt - num_shared), num_output)

    def _tokens(self, rng: random.Random, count: int) -> list[int]:
        return rng.choices(range(self.vocab_size), k=count)


def is_sharegpt(path: Path) -> bool:
    """Whether the file is one JSON list. Raises `ConfigError` if it cannot be read."""
    is_plain_text(path)
    with path.open("rb") as file:
        return file.readline(SNIFFED_BYTES).lstrip().startswith(b"[")


def read_workload(path: Path, vocab_size: int, max_context: int, max_tokens: int) -> list[LoadRequest]:
    """The requests of a file, in its order. Raises `ConfigError` naming what cannot be read."""
    is_text = is_plain_text(path)
    with path.open("rb") as file:
        begin = file.readline(SNIFFED_BYTES).lstrip()
    if begin.startswith(b"["):
        return [turns[0] for turns in read_sharegpt(path, max_context)]
    if b'"hash_ids"' in begin:
        return list(_mooncake(path, vocab_size, max_context))
    parser = LineParser(is_text, {"max_tokens": max_tokens})
    found = []
    for line, entry in read_entries(path, parser):
        if isinstance(entry, BadLine):
            raise ConfigError(f"{path}:{line}: {entry.message}")
        if entry.url != COMPLETIONS:
            raise ConfigError(f"{path}:{line}: load tests take prompts, not chats")
        body = entry.body
        limit = int(body.get("max_tokens") or max_tokens)
        found.append(
            LoadRequest(
                body.get("prompt", ""),
                limit,
                ignore_eos=bool(body.get("ignore_eos")),
                request_class=_class_of(body),
            )
        )
    return found


def _class_of(values: Mapping[str, Any]) -> str:
    """What a line names as its `class`, or in `metadata`, where OpenAI's API has a place for it."""
    metadata = values.get("metadata")
    found = values.get("class") or (metadata.get("class") if isinstance(metadata, dict) else None)
    return str(found or "")


def _mooncake(path: Path, vocab_size: int, max_context: int) -> Iterator[LoadRequest]:
    """Blocks of equal hash ids are equal tokens, so that shared prefixes are shared here, too.

    Lengths that exceed the model's context are cut to it: prompts from the end, so that prefixes stay.
    """
    first_ms: float | None = None
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row: dict[str, Any] = json.loads(line)
            timestamp_ms, num_output = float(row["timestamp"]), max(int(row["output_length"]), 1)
            num_prompt, hash_ids = max(int(row["input_length"]), 1), [int(id_) for id_ in row["hash_ids"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}:{number}: not a Mooncake trace line ({error})") from error
        first_ms = timestamp_ms if first_ms is None else first_ms
        asked = num_prompt, num_output
        num_output = min(num_output, max_context // 2)
        num_prompt = min(num_prompt, max_context - num_output)
        is_cut = asked != (num_prompt, num_output)
        tokens: list[int] = []
        for hash_id in hash_ids[: -(-num_prompt // MOONCAKE_BLOCK)]:
            tokens += random.Random(f"block {hash_id}").choices(range(vocab_size), k=MOONCAKE_BLOCK)
        num_own = max(num_prompt - len(tokens), 0)  # what the ids do not cover is this line's alone
        tokens += random.Random(f"line {number}").choices(range(vocab_size), k=num_own)
        at_s = (timestamp_ms - first_ms) / 1e3
        prompt = tokens[:num_prompt]
        yield LoadRequest(prompt, num_output, at_s, request_class=_class_of(row), is_cut=is_cut)


def read_sharegpt(path: Path, max_context: int) -> list[list[LoadRequest]]:
    """The human turns of each conversation, up to the first that is empty or has no answer.

    Lengths are in characters, which nobody has tokenized: what is likely to exceed the context is left out.
    Raises `ConfigError`.
    """
    try:
        conversations = [entry["conversations"] for entry in json.loads(path.read_text())]
        told = [[str(turn["value"]) for turn in conversation] for conversation in conversations]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not ShareGPT JSON ({type(error).__name__}: {error})") from error
    found = [_human_turns(turns, max_context) for turns in told]
    return [turns for turns in found if turns]


def _human_turns(told: Sequence[str], max_context: int) -> list[LoadRequest]:
    turns: list[LoadRequest] = []
    num_chars = 0
    for said, answer in zip(told[::2], told[1::2], strict=False):
        num_chars += len(said) + len(answer)
        if not said or not answer or (turns and num_chars > CHARS_PER_TOKEN * max_context):
            break
        num_output = max(len(answer) // CHARS_PER_TOKEN, 1)
        turns.append(LoadRequest(said, num_output, ignore_eos=False))
    return turns
