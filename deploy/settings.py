"""From defaults, a YAML file and command-line options to one checked configuration."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from deploy.models import resolve_model
from tandem.config import BUNDLED_MODELS, DRAFTS, ClusterConfig, SecurityConfig
from tandem.engine.implementation import settle
from tandem.errors import ConfigError


def load_config(
    file: Path | None,
    *,
    model: str | None = None,
    draft: str | None = None,
    dtype: str = "float32",
    quantization: str = "none",
    draft_quantization: str = "none",
    host: str = "127.0.0.1",
    port: int = 0,
    http_port: int | None = None,
    policy: str = "least-loaded",
    batch_dir: Path | None = None,
    **security: Path | bool | None,
) -> ClusterConfig:
    """The file's settings, overridden by what the command line names. Raises `ConfigError`.

    `security` are the fields of `SecurityConfig`; what is None or False was not named.
    """
    values = _read(file) if file else {}
    chosen = values.setdefault("model", {})
    if model is not None or "path" not in chosen:
        chosen["path"] = str(resolve_model(model))
    chosen.setdefault("dtype", dtype)
    if quantization != "none":
        chosen["quantization"] = quantization
    if "speculation" not in values or draft is not None:
        values["speculation"] = _speculation(draft, is_bundled=chosen["path"] == str(resolve_model(None)))
    if draft_quantization != "none":
        values["speculation"]["draft_quantization"] = draft_quantization
    router = values.setdefault("router", {})
    router.setdefault("host", host)
    router.setdefault("port", port)
    router.setdefault("http_port", http_port)
    router.setdefault("policy", policy)
    if batch_dir is not None:
        values.setdefault("batches", {})["dir"] = str(batch_dir.resolve())
    values.setdefault("security", {}).update({name: value for name, value in security.items() if value})
    return settle(ClusterConfig.from_dict(values))


def config_of(file: Path | None, options: Mapping[str, Any]) -> ClusterConfig:
    """The settings among a command's options, over the file's. Raises `ConfigError`."""
    known = {*inspect.signature(load_config).parameters, *(f.name for f in fields(SecurityConfig))}
    return load_config(file, **{name: value for name, value in options.items() if name in known})


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
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold a mapping of settings")
    return values
