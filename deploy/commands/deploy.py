"""`tandem deploy`: writes the files that put the service on a Ray cluster or on Kubernetes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.errors import ConfigError

if TYPE_CHECKING:
    from deploy.cluster.args import AppArgs

SERVE_FILE = "serve.yaml"
RAY_SERVICE_FILE = "rayservice.yaml"


def arguments(**chosen: Any) -> AppArgs:
    """The application's arguments, without those that are as they are anyway. Raises `ConfigError`."""
    try:
        from deploy.cluster.args import AppArgs
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"tandem deploy needs Ray ({error.name} is not installed); run pip install 'tandem-serve[ray]'"
        ) from error
    return AppArgs(**chosen)


def run(args: AppArgs, one_node: bool, gpus: int, image: str, folder: Path, as_json: bool) -> None:
    """Write the files into `folder`. Raises `ConfigError` if that cannot be done."""
    from deploy.cluster.manifest import Pods, as_yaml, on_several_nodes, ray_service, serve_config

    placed = args if one_node else on_several_nodes(args, gpus)
    files = {folder / SERVE_FILE: serve_config(placed)}
    if not one_node:
        files[folder / RAY_SERVICE_FILE] = ray_service(placed, Pods(image=image, gpus=gpus))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, document in files.items():
            path.write_text(as_yaml(document))
    except OSError as error:
        raise ConfigError(f"cannot write into {folder}: {error.strerror}") from error
    if as_json:
        print(json.dumps({"files": [str(path) for path in files]}))
        return
    print(f"serve deploy {folder / SERVE_FILE}")
    if not one_node:
        print(f"kubectl apply -f {folder / RAY_SERVICE_FILE}")
