"""From arguments to a graph of Serve deployments. Serve places, watches and replaces what is named here.

Router ──► PrefillServer × n      the router is the application's ingress and holds the store;
       └─► DecodeServer × m       tokens and KV go over gRPC, only addresses go over Serve
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application

from deploy.cluster.args import AppArgs, DeploymentArgs
from deploy.cluster.autoscaling import with_policy
from deploy.cluster.replicas import ROUTER, RouterReplica, WorkerReplica
from tandem.config import ClusterConfig
from tandem.errors import ConfigError

APP = "tandem"
STOP_MARGIN_S = 10.0  # after draining: to say goodbye and close
WORKER_CPUS = 0.2  # a share for the scheduler to place by, not a limit
ROUTER_CPUS = 0.1

COMMON: dict[str, Any] = {
    "max_ongoing_requests": 1000,  # calls for an address; requests of clients never come this way
    "health_check_period_s": 1.0,
    "health_check_timeout_s": 10.0,
    "graceful_shutdown_wait_loop_s": 0.1,
    "max_constructor_retry_count": 3,
    "logging_config": {"log_level": "WARNING", "enable_access_log": False},
}
HEAD = {"node:__internal_head__": 0.001}  # Ray gives it to the head node: the router's address stays the same


def build(config: ClusterConfig, args: AppArgs) -> Application:
    """The application for settings that are already checked. Raises `ConfigError`."""
    args.check(config)
    text = config.to_json()
    workers = []
    for name, role, side, count in (
        ("PrefillServer", "prefill", args.prefill_config, args.prefill),
        ("DecodeServer", "decode", args.decode_config, args.decode),
    ):
        options = _options(config, side, {"num_replicas": count})
        if autoscaling := options.get("autoscaling_config"):
            del options["num_replicas"]
            options["autoscaling_config"] = with_policy(role, autoscaling)
        worker = _deployment(WorkerReplica, name, options)
        workers.append(worker.bind(role, text, args.network, args.log_level))
    on_head = {"ray_actor_options": {"num_cpus": ROUTER_CPUS, "resources": HEAD}}
    router = _deployment(RouterReplica, ROUTER, _options(config, args.router_config, on_head))
    return router.bind(text, args.network, args.internal_port, args.log_level, workers)


def _options(config: ClusterConfig, side: DeploymentArgs, defaults: dict[str, Any]) -> dict[str, Any]:
    """Of one deployment: our defaults, then what the operator asks for.

    There is no `runtime_env` by default: with one Ray starts every process twice, and none ahead of time.
    """
    return {
        **COMMON,
        "graceful_shutdown_timeout_s": config.router.drain_s + STOP_MARGIN_S,
        "ray_actor_options": {"num_cpus": WORKER_CPUS},
        **defaults,
        **side.deployment_config,
    }


def _deployment(kind: type, name: str, options: dict[str, Any]) -> serve.Deployment:
    try:
        decorate = serve.deployment(name=name, **options)
        return decorate(kind)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"deployment_config of {name}: {error}") from error
