"""The Serve application's arguments and graph, without a cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
from pydantic import ValidationError
from ray.serve._private.build_app import build_app
from ray.serve.schema import ServeApplicationSchema

from deploy.app import app
from deploy.cluster.application import STOP_MARGIN_S, build
from deploy.cluster.args import AppArgs
from deploy.cluster.autoscaling import DecodePolicy, PrefillPolicy
from router.balance import Demand
from tandem.config import ClusterConfig, SecurityConfig
from tandem.errors import ConfigError
from tests.checkpoints import tiny_llama


def deployments(application):
    """By name, what Serve would deploy."""
    return {d.name: d for d in build_app(application, name="tandem").deployments}


def test_the_graph_has_a_router_and_both_kinds_of_worker():
    found = deployments(app(AppArgs(model=str(tiny_llama()), prefill=2, decode=3)))
    assert {name: d.num_replicas for name, d in found.items()} == {
        "Router": 1,
        "PrefillServer": 2,
        "DecodeServer": 3,
    }
    settings = ClusterConfig.from_json(found["DecodeServer"].init_args[1])
    assert settings.model.path == tiny_llama()


def test_every_replica_has_time_to_drain_and_a_process_that_ray_need_not_prepare():
    settings = ClusterConfig()
    for deployment in deployments(build(settings, AppArgs())).values():
        config = deployment._deployment_config
        assert config.graceful_shutdown_timeout_s == settings.router.drain_s + STOP_MARGIN_S
        assert not deployment.ray_actor_options.get("runtime_env")


def test_what_the_operator_asks_for_goes_to_serve():
    asked = {"ray_actor_options": {"num_cpus": 2, "num_gpus": 0.5}, "max_replicas_per_node": 1}
    found = deployments(app(AppArgs(decode_config={"deployment_config": asked})))
    actor = found["DecodeServer"].ray_actor_options
    assert (actor["num_cpus"], actor["num_gpus"]) == (2, 0.5)
    assert found["DecodeServer"]._replica_config.max_replicas_per_node == 1
    assert found["PrefillServer"].ray_actor_options["num_cpus"] < 1


def test_settings_come_from_a_file_and_in_place(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("cache: {block_size: 32}\nrouter: {max_queue: 7, port: 1234}\n")
    tree = AppArgs(config=file, engine_kwargs={"router": {"max_queue": 9}}).config_tree()
    assert (tree.cache.block_size, tree.router.max_queue, tree.router.port) == (32, 9, 1234)
    there = AppArgs(engine_kwargs={"model": {"device": "cuda"}}).config_tree()
    assert (there.model.device, there.model.implementation) == ("cuda", "transformers")
    assert AppArgs(http_port=77).config_tree().router.http_port == 77
    assert AppArgs(http_port=None).config_tree().router.http_port is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"prefil": 2}, "prefil"),
        ({"prefill": 0}, "greater than or equal to 1"),
        ({"network": "internet"}, "loopback"),
        ({"decode_config": {"replicas": 3}}, "replicas"),
    ],
)
def test_wrong_arguments_are_named(arguments, says):
    with pytest.raises(ValidationError, match=says):
        AppArgs(**arguments)


def test_unknown_settings_and_options_of_serve_are_refused():
    with pytest.raises(ConfigError, match=r"unknown setting cache\.blok_size"):
        AppArgs(engine_kwargs={"cache": {"blok_size": 3}}).config_tree()
    with pytest.raises(ConfigError, match=r"PrefillServer.*num_replica"):
        app(AppArgs(prefill_config={"deployment_config": {"num_replica": 3}}))


def test_plain_traffic_between_machines_must_be_asked_for():
    args = AppArgs(network="node")
    with pytest.raises(ConfigError, match=r"set engine_kwargs\.security\.insecure"):
        build(ClusterConfig(), args)
    assert build(replace(ClusterConfig(), security=SecurityConfig(insecure=True)), args)


def test_serve_accepts_the_application_by_its_import_path():
    schema = ServeApplicationSchema(import_path="deploy.app:app", args={"prefill": 2, "decode": 2})
    assert AppArgs.model_validate(schema.args).decode == 2


def context(target, **metrics):
    """As Serve hands it to a policy: each metric by replica."""
    return SimpleNamespace(target_num_replicas=target, aggregated_metrics=metrics)


def reported(**figures):
    idle = {field.name: 0.0 for field in fields(Demand)} | {"num_decode": 2.0, "decode_blocks": 200.0}
    return {name: {"a": value / 2, "b": value} for name, value in (idle | figures).items()}


def test_each_side_is_scaled_by_its_own_need():
    busy = context(1, **reported(queued_tokens=3000, reserved_blocks=160, waiting_blocks=80))
    assert PrefillPolicy(queued_tokens=1000)(busy) == (3, {})
    assert DecodePolicy(occupancy=0.8)(busy) == (pytest.approx(3), {})
    late = context(2, **reported(reserved_blocks=10, late_share=0.3))
    assert DecodePolicy(late_share=0.25)(late) == (pytest.approx(2.4), {})
    assert DecodePolicy()(late) == (pytest.approx(3), {})


def test_before_the_first_report_nothing_changes():
    for policy in (PrefillPolicy(), DecodePolicy()):
        assert policy(context(3)) == (3, {})
        assert policy(context(3, queued_tokens={})) == (3, {})


def test_autoscaling_comes_with_our_policy_and_serve_can_load_it():
    scaled = {"deployment_config": {"autoscaling_config": {"min_replicas": 1, "max_replicas": 4}}}
    found = deployments(app(AppArgs(prefill_config=scaled, decode_config=scaled)))
    for name, policy in (("PrefillServer", PrefillPolicy), ("DecodeServer", DecodePolicy)):
        config = found[name]._deployment_config.autoscaling_config
        assert config.max_replicas == 4
        assert config.policy.get_policy() is policy


WITHOUT_RAY = """
import sys
sys.modules["ray"] = None
from deploy.cli import main
main()
"""


@pytest.mark.e2e
def test_without_ray_the_command_says_what_to_install():
    command = [sys.executable, "-c", WITHOUT_RAY, "serve", "--ray", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "pip install 'tandem-serve[ray]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_arguments_survive_json():
    args = AppArgs(prefill=2, engine_kwargs={"cache": {"block_size": 32}})
    assert AppArgs.model_validate(json.loads(args.model_dump_json())) == args
