"""Where samples come from: the bundled pair's held-out text by kind, or files of the caller's.

A sample is a text of at least so many tokens, clipped to exactly that; shorter texts are left out.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from bench.bundled_pair.corpus import (
    SourceFile,
    TokenArchive,
    archive,
    is_held_out,
    is_test,
    source_files,
    standard_library,
)
from bench.eval.experiment import Settings
from bench.speculation.text import Tokens
from tandem.errors import ConfigError

DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True, slots=True)
class Source:
    """Texts of one kind in one array: text i is `tokens[starts[i] : ends[i]]`; they may overlap."""

    name: str
    tokens: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]

    def samples(self, count: int, length: int) -> list[Tokens]:
        """Up to `count` texts of at least `length` tokens, clipped to that and spread evenly.

        Raises `ConfigError` if there is none.
        """
        usable = self.starts[self.ends - self.starts >= length]
        if len(usable) == 0:
            raise ConfigError(f"no text of {self.name} has {length} tokens; give longer texts by --text")
        chosen = usable[np.arange(min(count, len(usable))) * len(usable) // min(count, len(usable))]
        return [self.stretch(int(start), length) for start in chosen]

    def stretch(self, start: int, length: int) -> Tokens:
        """`length` tokens from `start` on, or fewer at the end."""
        return tuple(self.tokens[start : start + length].tolist())


def sources(settings: Settings, target: Path) -> Iterator[Source]:
    """What the settings name, as tokens of the target; read when asked for.

    Raises `ConfigError` for unusable files.
    """
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    if not settings.texts:
        yield from _bundled(tokenizer)
    for path in settings.texts:
        yield _of_texts(path.stem, read_texts(path), tokenizer)


def _bundled(tokenizer: Tokenizer) -> Iterator[Source]:
    """Of the standard library's held-out files: modules, tests, and docstrings of both."""
    everything: list[SourceFile] = []
    for name, are_tests in (("modules", False), ("tests", True)):
        files = _held_out(are_tests)
        if not files:
            raise ConfigError(
                f"{standard_library()} has no held-out {name}; install the library's .py files, or name a "
                "file by --text"
            )
        everything += files
        yield _of_archive(name, archive(tokenizer, files))
    yield _of_texts("docstrings", docstrings(everything), tokenizer)


def _held_out(are_tests: bool) -> list[SourceFile]:
    wanted = partial(_is_wanted, are_tests)
    return list(source_files(standard_library(), include_tests=are_tests, wanted=wanted))


def _is_wanted(are_tests: bool, path: str) -> bool:
    return is_held_out(path) and is_test(path) == are_tests


def _of_archive(name: str, data: TokenArchive) -> Source:
    """Texts begin at top-level statements and go on to the end of their file."""
    ends = data.docs[np.searchsorted(data.docs, data.starts, side="right")]
    return Source(name, data.tokens.astype(np.int64), data.starts, ends)


def _of_texts(name: str, texts: Iterable[str], tokenizer: Tokenizer) -> Source:
    ids = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    ends = np.cumsum([len(some) for some in ids], dtype=np.int64)
    starts = ends - np.array([len(some) for some in ids], dtype=np.int64)
    return Source(name, np.concatenate([np.array(some, dtype=np.int64) for some in ids]), starts, ends)


def docstrings(files: Sequence[SourceFile]) -> list[str]:
    """All of these files, in order."""
    found = []
    for file in files:
        nodes = [node for node in ast.walk(ast.parse(file.text)) if isinstance(node, DEFINITIONS)]
        found += [text for node in nodes if (text := ast.get_docstring(node))]
    return found


def read_texts(path: Path) -> list[str]:
    """Of JSONL the `text` of each line, of other files each line that is not blank.

    Raises `ConfigError` if the file cannot be read or holds no text.
    """
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {path}: {error}") from error
    if not lines:
        raise ConfigError(f"--text {path} holds no text")
    if path.suffix != ".jsonl":
        return lines
    return [_text_of(line, f"--text {path}, record {number}") for number, line in enumerate(lines, 1)]


def _text_of(line: str, where: str) -> str:
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is no JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ConfigError(f'{where} has no text; each line is {{"text": "…"}}')
    return str(record["text"])
