"""Files of problems: JSONL (gzip or not) and CSV, with errors that name the line."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tandem.errors import ConfigError

P = TypeVar("P")


def read_problems(path: Path, parse: Callable[[Mapping[str, Any]], P], what: str) -> list[P]:
    """Every line of a JSONL file through `parse`. Raises `ConfigError` naming the line that is none."""
    found = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found.append(parse(row))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ConfigError(f"{path}:{number} is no line of {what} ({reason})") from error
    if not found:
        raise ConfigError(f"{path} has no problems; it should be {what}")
    return found


def read_csv(path: Path) -> Iterator[list[str]]:
    """Rows of a CSV file, its header included. Raises `ConfigError`."""
    yield from csv.reader(_text(path).splitlines(keepends=True))


def _text(path: Path) -> str:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return data.decode("utf-8-sig")
    except (OSError, EOFError) as error:
        why = (isinstance(error, OSError) and error.strerror) or error
        raise ConfigError(f"cannot read {path}: {why}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start})") from error
