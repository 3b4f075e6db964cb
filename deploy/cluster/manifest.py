"""The files of a deployment: Serve's own config, and a RayService for KubeRay that carries it.

Field names are those of Ray's `ServeDeploySchema` and of KubeRay's `ray.io/v1` RayService.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import yaml

from deploy.cluster.application import APP
from deploy.cluster.args import AppArgs

IMPORT_PATH = "deploy.app:app"
GROUPS = ("prefill", "decode")
SHARE = 0.001  # of a node's mark: enough to place by, and any number of replicas fits


@dataclass(frozen=True, slots=True, kw_only=True)
class Pods:
    """What Kubernetes gives each pod of a group."""

    image: str
    cpus: int = 4
    memory: str = "16Gi"
    gpus: int = 0


def mark(group: str) -> str:
    """The custom resource that nodes for one kind of worker have."""
    return f"tandem_{group}"


def on_several_nodes(args: AppArgs, gpus_per_worker: float = 0) -> AppArgs:
    """The same service, with each kind of worker on the nodes marked for it, and on GPUs if it gets any."""
    sides: dict[str, Any] = {}
    for group in GROUPS:
        actor: dict[str, Any] = {"num_cpus": 1, "resources": {mark(group): SHARE}}
        if gpus_per_worker:
            actor["num_gpus"] = gpus_per_worker
        sides[f"{group}_config"] = {"deployment_config": {"ray_actor_options": actor}}
    settings: dict[str, Any] = {"security": {"insecure": True}}
    if gpus_per_worker:
        settings["model"] = {"device": "cuda"}
    several = {"host": "0.0.0.0", "network": "node", "engine_kwargs": settings}
    return AppArgs.model_validate({**args.model_dump(exclude_defaults=True), **several, **sides})


def serve_config(args: AppArgs, *, proxies: bool = False) -> dict[str, Any]:
    """What `serve deploy` takes. Only KubeRay needs Serve's HTTP proxies: it asks them for health."""
    return {
        "proxy_location": "EveryNode" if proxies else "Disabled",
        "applications": [
            {
                "name": APP,
                "import_path": IMPORT_PATH,
                "args": args.model_dump(mode="json", exclude_defaults=True),
            }
        ],
    }


def ray_service(args: AppArgs, pods: Pods) -> dict[str, Any]:
    """A RayService: the router on the head pod, a group of pods for each kind of worker."""
    ports = {"gcs": 6379, "dashboard": 8265, "serve": 8000, "grpc": args.port}
    if args.http_port is not None:
        ports["openai"] = args.http_port
    head = {
        "rayStartParams": {"dashboard-host": "0.0.0.0"},
        "template": _template("ray-head", pods, gpus=0, ports=ports),
    }
    workers = [
        {
            "groupName": group,
            "replicas": count,
            "minReplicas": count,
            "maxReplicas": count,
            "rayStartParams": {"resources": f'"{{\\"{mark(group)}\\": 1}}"'},
            "template": _template("ray-worker", pods, gpus=pods.gpus, ports={}),
        }
        for group, count in (("prefill", args.prefill), ("decode", args.decode))
    ]
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": APP},
        "spec": {
            "serveConfigV2": as_yaml(serve_config(args, proxies=True)),
            "rayClusterConfig": {
                "rayVersion": version("ray"),
                "headGroupSpec": head,
                "workerGroupSpecs": workers,
            },
        },
    }


def _template(name: str, pods: Pods, gpus: int, ports: dict[str, int]) -> dict[str, Any]:
    amounts: dict[str, Any] = {"cpu": str(pods.cpus), "memory": pods.memory}
    if gpus:
        amounts["nvidia.com/gpu"] = gpus
    container: dict[str, Any] = {
        "name": name,
        "image": pods.image,
        "resources": {"requests": amounts, "limits": dict(amounts)},
    }
    if ports:
        container["ports"] = [{"name": port, "containerPort": number} for port, number in ports.items()]
    return {"spec": {"containers": [container]}}


def as_yaml(document: dict[str, Any]) -> str:
    """Keys in the order in which they were put."""
    return str(yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=100))


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as such, and repeats what is shared."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    ),
)
