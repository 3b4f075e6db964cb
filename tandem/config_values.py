"""Settings from plain values, as YAML and JSON hold them: nested mappings of numbers, texts and flags."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from tandem.errors import ConfigError

T = TypeVar("T")


def build(kind: type[T], values: dict[str, Any], where: str = "") -> T:
    """A dataclass of settings. Unknown keys and wrong types raise `ConfigError`."""
    _check(isinstance(values, dict), f"{where.rstrip('.') or 'the configuration'} must be a mapping")
    hints = get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind) if f.init]  # type: ignore[arg-type]
    for key in values:
        _check(key in names, f"unknown setting {where}{key}; known: {', '.join(sorted(names))}")
    return kind(**{key: _convert(hints[key], value, f"{where}{key}") for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type[Any], hint), value, f"{where}.")
    if isinstance(hint, types.UnionType):
        return None if value is None else _convert(typing.get_args(hint)[0], value, where)
    if hint is Path:
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    _check(type(value) is hint, f"{where} must be of type {hint.__name__}, not {type(value).__name__}")
    return value


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
