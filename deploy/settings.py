"""From defaults, a YAML file and command-line options to one checked configuration."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from deploy.models import resolve_model
from tandem.config import BUNDLED_MODELS, DRAFTS, ClusterConfig, SecurityConfig
from tandem.engine.implementation import settle
from tandem.errors import ConfigError

if TYPE_CHECKING:
    import typer


def load_config(
    file: Path | None,
    *,
    model: str | None = None,
    draft: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    quantization: str = "none",
    draft_quantization: str = "auto",
    host: str = "127.0.0.1",
    port: int = 0,
    http_port: int | None = None,
    policy: str = "least-loaded",
    disaggregate: str = "always",
    itl_limit_s: float = 0.0,
    batch_dir: Path | None = None,
    changes: Mapping[str, Any] | None = None,
    named: Collection[str] = (),
    **security: Path | bool | None,
) -> ClusterConfig:
    """The file's settings, overridden by what the command line names. Raises `ConfigError`.

    Options in `named` were given: they count more than the file, as do a model, a draft, a folder and what
    is set in `security` (fields of `SecurityConfig`). Others are defaults for what the file leaves out.
    `changes`, which look as the file does, count most.
    """
    values = _read(file) if file else {}
    chosen, router, speculation, guarded = _sections(values, "model", "router", "speculation", "security")
    _choose(chosen, speculation, model, draft)
    placing = {"policy": policy, "disaggregate": disaggregate, "itl_limit_s": itl_limit_s}
    for section, options in (
        (chosen, {"device": device, "dtype": dtype, "quantization": quantization}),
        (speculation, {"draft_quantization": draft_quantization}),
        (router, {"host": host, "port": port, "http_port": http_port, **placing}),
    ):
        section |= {name: value for name, value in options.items() if name in named or name not in section}
    if batch_dir is not None:
        _section(values, "batches")["dir"] = str(batch_dir.resolve())
    guarded |= {name: value for name, value in security.items() if value}
    return settle(ClusterConfig.from_dict(_merged(values, changes or {})))


def config_of(file: Path | None, options: Mapping[str, Any], named: Collection[str] = ()) -> ClusterConfig:
    """The settings among a command's options, over the file's where named. Raises `ConfigError`."""
    known = {*inspect.signature(load_config).parameters, *(f.name for f in fields(SecurityConfig))}
    settings = {name: value for name, value in options.items() if name in known}
    return load_config(file, named=named, **settings)


def named_options(context: typer.Context) -> set[str]:
    """The options that a command was given, whatever their values."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def _choose(
    chosen: dict[str, Any], speculation: dict[str, Any], model: str | None, draft: str | None
) -> None:
    """The model and what drafts for it: those named, else the file's, else the bundled pair."""
    if model is not None or "path" not in chosen:
        chosen["path"] = str(resolve_model(model))
    is_bundled = chosen["path"] == str(resolve_model(None))
    if draft is not None:
        speculation |= {"draft_path": None} | _speculation(draft, is_bundled)
    elif "draft" not in speculation:
        speculation |= _speculation(None, is_bundled) | speculation


def _speculation(draft: str | None, is_bundled: bool) -> dict[str, Any]:
    """A kind of draft, or a draft model by folder or hub id; the bundled target has a draft of its own."""
    if draft in DRAFTS and draft != "model":
        return {"draft": draft}
    if draft is None:
        return {"draft": "model", "draft_path": str(BUNDLED_MODELS / "draft")} if is_bundled else {}
    return {"draft": "model", "draft_path": str(resolve_model(draft))}


def _read(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from error
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"{file} must hold a mapping of settings")
    return {name: section for name, section in (values or {}).items() if section is not None}


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `changes` laid over it, section by section."""
    merged = dict(values)
    for key, change in changes.items():
        old = merged.get(key)
        merged[key] = _merged(old, change) if isinstance(old, dict) and isinstance(change, dict) else change
    return merged


def _sections(values: dict[str, Any], *names: str) -> list[dict[str, Any]]:
    return [_section(values, name) for name in names]


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    """A section of the settings, made if it is not there."""
    section: Any = values.setdefault(name, {})
    if not isinstance(section, dict):
        raise ConfigError(f"{name} must be a mapping")
    return section
