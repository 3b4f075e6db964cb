"""Settings from plain values, as YAML and JSON hold them (nested mappings), and the checks on them."""

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
    check(isinstance(values, dict), f"{where.rstrip('.') or 'the configuration'} must be a mapping")
    hints = get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind) if f.init]  # type: ignore[arg-type]
    for key in values:
        check(key in names, f"unknown setting {where}{key}; known: {', '.join(sorted(names))}")
    return kind(**{key: _convert(hints[key], value, f"{where}{key}") for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type[Any], hint), value, f"{where}.")
    if isinstance(hint, types.UnionType):
        return None if value is None else _convert(typing.get_args(hint)[0], value, where)
    if hint is Path:
        check(isinstance(value, str | Path), f"{where} must be a path, not {type(value).__name__}")
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    check(type(value) is hint, f"{where} must be of type {hint.__name__}, not {type(value).__name__}")
    return value


def check(condition: bool, message: str) -> None:
    """Raise `ConfigError` unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def check_positive(config: object, *names: str) -> None:
    """Raise `ConfigError` unless these settings are all more than 0."""
    for name in names:
        value = getattr(config, name)
        check(value > 0, f"{type(config).__name__}.{name} must be more than 0, not {value}")
