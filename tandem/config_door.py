"""Settings of the router: where it listens, whom it lets in, how much may wait, what clients may leave here.
Part of `tandem.config`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tandem.config_values import check, check_positive

DISAGGREGATE = ("always", "auto", "never")
POLICIES = ("least-loaded", "power-of-two", "kv-aware", "session")  # router.policy


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """The door: where it listens, how many may wait, for how long."""

    host: str = "127.0.0.1"
    port: int = 0  # of gRPC; 0 takes a free one
    http_port: int | None = None  # of the OpenAI API; 0 takes a free one, none has no such listener
    policy: str = "least-loaded"  # or power-of-two, kv-aware, session: which worker is next (router.policy)
    disaggregate: str = (
        "always"  # or auto, never: whether prompts go to prefill workers (router.disaggregation)
    )
    local_prefill_tokens: int = 2048  # with auto: the longest prompt that may stay with its decode worker
    store_fallback: bool = True  # prompts whose KV cannot be stored are computed where they are decoded
    prefill_fallback: bool = True  # and so are all while every prefill worker is lost
    max_queue: int = 1024
    max_requests_per_tenant: int = 0  # completions waiting or running; 0: no limit
    default_timeout_s: float = 600.0
    aging_s: float = 5.0  # waiting this long counts as one step of priority
    itl_limit_s: float = 0.0  # longer gaps ask for decode workers, and auto avoids them; 0: no limit
    heartbeat_s: float = 0.5
    worker_timeout_s: float = 2.0  # silence after which a worker is taken for lost
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        check_positive(
            self, "max_queue", "default_timeout_s", "aging_s", "heartbeat_s", "worker_timeout_s", "drain_s"
        )
        known = ", ".join(DISAGGREGATE)
        is_known = self.disaggregate in DISAGGREGATE
        check(is_known, f"router disaggregate must be one of {known}, not {self.disaggregate}")
        check(self.local_prefill_tokens >= 0, "router local_prefill_tokens must be 0 or more")
        check(
            self.max_requests_per_tenant >= 0, "router max_requests_per_tenant must be 0 (no limit) or more"
        )
        check(self.itl_limit_s >= 0, "router itl_limit_s must be 0 (no limit) or more")
        check(self.policy in POLICIES, f"unknown policy {self.policy}; known: {', '.join(POLICIES)}")
        for port in (self.port, self.http_port or 0):
            check(0 <= port < 65536, f"router port must be in [0, 65535], not {port}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SecurityConfig:
    """Who may call from outside. All are files; `tandem.security` reads them at start."""

    api_key_file: Path | None = (
        None  # bearer tokens, one a line, each with ` tenant=NAME` or not; without it everybody may call
    )
    tls_cert: Path | None = None  # certificate chain, PEM
    tls_key: Path | None = None
    tls_client_ca: Path | None = None  # only clients with a certificate of this CA may connect
    insecure: bool = False  # listen beyond this machine without tokens and TLS

    def __post_init__(self) -> None:
        has_pair = (self.tls_cert is None) == (self.tls_key is None)
        check(has_pair, "a TLS certificate needs its key, and a key its certificate")
        needs_pair = self.tls_client_ca is not None
        check(not needs_pair or self.tls_cert is not None, "a client CA needs a TLS certificate and key")


@dataclass(frozen=True, slots=True, kw_only=True)
class InternalConfig:
    """How the processes of a service know each other. All are files, the same on every machine
    (`tandem.internal`)."""

    tls_cert: Path | None = None  # certificate chain for the name tandem.internal, PEM
    tls_key: Path | None = None
    tls_ca: Path | None = None  # the authority of those certificates, and of nothing else
    token_file: Path | None = None  # bearer tokens, one a line: the first is shown, all are accepted

    def __post_init__(self) -> None:
        given = [file is not None for file in (self.tls_cert, self.tls_key, self.tls_ca)]
        check(all(given) or not any(given), "internal TLS needs tls_cert, tls_key and tls_ca together")
        check(
            self.token_file is None or self.tls_cert is not None,
            "internal token_file needs internal TLS: in plaintext a token is no secret",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchConfig:
    """Files of requests that clients leave here to be run: /v1/files, /v1/batches and BatchService."""

    dir: Path | None = None  # where files, results and their state are kept; without one there are none
    max_in_flight: int = 64  # lines of one tenant sent at once
    max_attempts: int = 3  # times a line may fail by itself before it is a failure
    max_file_bytes: int = 200 << 20
    max_tenant_bytes: int = 4 << 30  # files and results of one tenant; what is beyond is refused
    max_tenant_files: int = 1000  # and as many batches; the oldest that have ended are forgotten

    def __post_init__(self) -> None:
        check_positive(self, "max_in_flight", "max_attempts", "max_file_bytes", "max_tenant_bytes")
        check_positive(self, "max_tenant_files")
