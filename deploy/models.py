"""From what a user names, a folder or a hub id, to a local folder with a servable checkpoint."""

from __future__ import annotations

from pathlib import Path

from tandem.config import BUNDLED_MODELS
from tandem.errors import ConfigError

FILES = ["*.json", "*.safetensors", "tokenizer.model"]


def resolve_model(name: str | None) -> Path:
    """The bundled target without a name, a folder as it is, anything else from the hub's cache or the hub.

    Raises `ConfigError` with what to do if there is no such model.
    """
    if name is None:
        return BUNDLED_MODELS / "target"
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ConfigError(f"no folder {name}; give a folder with config.json, or a hub id such as org/name")
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except Exception as error:  # the hub client raises a dozen kinds for "not there" and "no network"
        raise ConfigError(
            f"{name} is neither a folder nor a model the hub would give ({type(error).__name__}); "
            "download the checkpoint and give its folder"
        ) from error
