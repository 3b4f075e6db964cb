"""The files for Ray and Kubernetes: accepted by Serve's schema, sound by KubeRay's, and up to date."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator
from ray.serve.schema import ServeDeploySchema

from deploy.cluster.application import build
from deploy.cluster.args import AppArgs
from tandem.errors import ConfigError
from tests.command import tandem

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
FILES = [DEPLOY / "configs" / "one_node.yaml", DEPLOY / "configs" / "cluster.yaml"]
RAY_SERVICE = DEPLOY / "kuberay" / "rayservice.yaml"


def closed(required: list[str], properties: dict) -> dict:
    """An object with these fields and no others."""
    return {
        "type": "object",
        "required": required,
        "additionalProperties": False,
        "properties": properties,
    }


TEXT, COUNT = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}
AMOUNTS = closed(["cpu", "memory"], {"cpu": TEXT, "memory": TEXT, "nvidia.com/gpu": COUNT})
PORT = closed(
    ["name", "containerPort"],
    {"name": {"type": "string", "pattern": "^[a-z0-9-]{1,15}$"}, "containerPort": COUNT},
)
CONTAINER = closed(
    ["name", "image", "resources"],
    {
        "name": TEXT,
        "image": TEXT,
        "resources": closed(["requests", "limits"], {"requests": AMOUNTS, "limits": AMOUNTS}),
        "ports": {"type": "array", "items": PORT},
    },
)
PODS = closed(
    ["spec"],
    {"spec": closed(["containers"], {"containers": {"type": "array", "minItems": 1, "items": CONTAINER}})},
)
PARAMS = {"type": "object", "additionalProperties": TEXT}  # KubeRay takes texts only
HEAD = closed(["rayStartParams", "template"], {"rayStartParams": PARAMS, "template": PODS})
GROUP = closed(
    ["groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"],
    {
        "groupName": TEXT,
        **dict.fromkeys(("replicas", "minReplicas", "maxReplicas"), COUNT),
        "rayStartParams": PARAMS,
        "template": PODS,
    },
)
# The fields of ray.io/v1 RayService that we write, with the types of its custom resource definition.
RAY_SERVICE_SCHEMA = closed(
    ["apiVersion", "kind", "metadata", "spec"],
    {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayService"},
        "metadata": closed(["name"], {"name": TEXT}),
        "spec": closed(
            ["serveConfigV2", "rayClusterConfig"],
            {
                "serveConfigV2": TEXT,
                "rayClusterConfig": closed(
                    ["rayVersion", "headGroupSpec", "workerGroupSpecs"],
                    {
                        "rayVersion": TEXT,
                        "headGroupSpec": HEAD,
                        "workerGroupSpecs": {"type": "array", "items": GROUP},
                    },
                ),
            },
        ),
    },
)


def tandem_deploy(folder: Path, *options: str) -> dict[str, Path]:
    done = tandem("deploy", "--out", folder, "--json", *options)
    assert done.returncode == 0, done.stderr
    return {Path(path).name: Path(path) for path in json.loads(done.stdout)["files"]}


def application(document: dict) -> dict:
    (only,) = document["applications"]
    return only


def check_serve(document: dict) -> AppArgs:
    """What Serve would start from it."""
    ServeDeploySchema.model_validate(document)
    args = AppArgs.model_validate(application(document)["args"])
    assert build(args.config_tree(), args)
    return args


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_serve_accepts_the_configs(file):
    args = check_serve(yaml.safe_load(file.read_text()))
    assert (args.prefill, args.decode) == (2, 2)


def test_kuberay_gets_the_fields_it_knows():
    document = yaml.safe_load(RAY_SERVICE.read_text())
    Draft202012Validator(RAY_SERVICE_SCHEMA).validate(document)
    check_serve(yaml.safe_load(document["spec"]["serveConfigV2"]))


def test_every_worker_has_nodes_it_can_be_placed_on():
    spec = yaml.safe_load(RAY_SERVICE.read_text())["spec"]
    groups = spec["rayClusterConfig"]["workerGroupSpecs"]
    marks = [json.loads(json.loads(group["rayStartParams"]["resources"])) for group in groups]
    args = application(yaml.safe_load(spec["serveConfigV2"]))["args"]
    for side, group in (("prefill", 0), ("decode", 1)):
        wanted = args[f"{side}_config"]["deployment_config"]["ray_actor_options"]["resources"]
        assert wanted.keys() == marks[group].keys()
        assert groups[group]["replicas"] == args[side]


def test_the_files_are_those_the_command_writes(tmp_path):
    one = tandem_deploy(tmp_path / "one", "--one-node", "--prefill", "2", "--decode", "2")
    several = tandem_deploy(tmp_path / "several", "--prefill", "2", "--decode", "2")
    kept = [
        (one["serve.yaml"], FILES[0]),
        (several["serve.yaml"], FILES[1]),
        (several["rayservice.yaml"], RAY_SERVICE),
    ]
    for written, file in kept:
        lines = [line for line in file.read_text().splitlines(keepends=True) if not line.startswith("#")]
        assert "".join(lines) == written.read_text(), f"write {file.name} again with tandem deploy"


def test_gpus_and_the_image_reach_the_pods(tmp_path):
    files = tandem_deploy(
        tmp_path, "--gpus", "2", "--image", "registry.example/tandem:1", "--model", "org/name"
    )
    document = yaml.safe_load(files["rayservice.yaml"].read_text())
    Draft202012Validator(RAY_SERVICE_SCHEMA).validate(document)
    cluster = document["spec"]["rayClusterConfig"]
    containers = [group["template"]["spec"]["containers"][0] for group in cluster["workerGroupSpecs"]]
    assert [c["resources"]["limits"]["nvidia.com/gpu"] for c in containers] == [2, 2]
    assert {c["image"] for c in containers} == {"registry.example/tandem:1"}
    served = application(yaml.safe_load(document["spec"]["serveConfigV2"]))["args"]
    assert served["model"] == "org/name"
    assert served["decode_config"]["deployment_config"]["ray_actor_options"]["num_gpus"] == 2
    assert served["engine_kwargs"]["model"] == {"device": "cuda"}


def test_the_cluster_config_without_consent_to_plain_traffic_is_refused():
    args = application(yaml.safe_load(FILES[1].read_text()))["args"]
    del args["engine_kwargs"]
    refused = AppArgs.model_validate(args)
    with pytest.raises(ConfigError, match="insecure"):
        build(refused.config_tree(), refused)
