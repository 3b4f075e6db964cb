"""What the Ray Serve application is started with: typed, checked, in Serve's own words where it has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from deploy.settings import load_config
from tandem.config import ClusterConfig
from tandem.errors import ConfigError
from tandem.log import known_level

PORT = 50051
INTERNAL_PORT = 50052
HTTP_PORT = 8080  # Serve's own proxy has 8000


class DeploymentArgs(BaseModel):
    """Of one deployment: what `serve.deployment` takes, such as `ray_actor_options` or `num_replicas`."""

    model_config = ConfigDict(extra="forbid")

    deployment_config: dict[str, Any] = Field(default_factory=dict)


class AppArgs(BaseModel):
    """The arguments of `deploy.app:app`."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None  # folder or hub id; the bundled one by default
    draft: str | None = None
    config: Path | None = None  # YAML file with any setting of the service
    engine_kwargs: dict[str, Any] = Field(default_factory=dict)  # the same settings in place, by section

    prefill: int = Field(default=1, ge=1)  # replicas
    decode: int = Field(default=1, ge=1)
    router_config: DeploymentArgs = Field(default_factory=DeploymentArgs)
    prefill_config: DeploymentArgs = Field(default_factory=DeploymentArgs)
    decode_config: DeploymentArgs = Field(default_factory=DeploymentArgs)

    host: str = "127.0.0.1"  # where clients reach the router
    port: int = PORT  # of gRPC
    http_port: int | None = HTTP_PORT  # of the OpenAI API
    network: Literal["loopback", "node"] = "loopback"  # where our processes reach each other
    internal_port: int = INTERNAL_PORT  # of the router, for workers; fixed, so that they find it again
    log_level: str = "WARNING"

    def config_tree(self) -> ClusterConfig:
        """The service's settings. Raises `ConfigError`."""
        return load_config(
            self.config,
            model=self.model,
            draft=self.draft,
            host=self.host,
            port=self.port,
            http_port=self.http_port,
            changes=self.engine_kwargs,
            named=self.model_fields_set,
        )

    def check(self, config: ClusterConfig) -> None:
        """Raise `ConfigError` for a network that others could listen in on, unless that is wanted, and for a
        log level that is none."""
        known_level(self.log_level)
        is_guarded = config.internal.tls_cert is not None
        if self.network == "node" and not (is_guarded or config.security.insecure):
            raise ConfigError(
                "network: node lets the processes of the service talk across machines without encryption; "
                "set engine_kwargs.internal.tls_cert, tls_key and tls_ca (SECURITY.md), or keep that network "
                "to yourself and set engine_kwargs.security.insecure: true"
            )
