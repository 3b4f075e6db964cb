"""`redis://[USER:PASSWORD@]HOST[:PORT][/DB]`, or `rediss://` over TLS: how to connect to Redis or Valkey.

No command is repeated behind its caller's back, and none waits longer than the time it was given. Options:
`password_file`, and for TLS `ca`, `cert` and `key`, all paths.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from tandem.errors import ConfigError

if TYPE_CHECKING:
    import redis

TIMEOUT_S = 1.0
PORT = 6379
SAFE_POLICIES = ("noeviction", "volatile-ttl")  # others drop what somebody believes is there
_TLS_FILES = (("ca_certs", "ca"), ("certfile", "cert"), ("keyfile", "key"))


def redis_client(url: str, timeout_s: float = TIMEOUT_S) -> redis.Redis:
    """A client that is not connected yet. Raises `ConfigError` for a URL or a file that cannot be used."""
    try:
        import redis
    except ImportError:
        raise ConfigError("redis:// needs the redis package: pip install 'tandem-serve[redis]'") from None
    return redis.Redis(**redis_settings(url, timeout_s))


def check_policy(client: redis.Redis, url: str) -> None:
    """Raise `ConfigError` if the server may evict what it was given; what redis-py raises passes."""
    memory: Any = client.info("memory")
    policy = memory.get("maxmemory_policy")
    if policy not in SAFE_POLICIES:
        raise ConfigError(
            f"Redis at {redacted(url)} may evict KV: set maxmemory-policy to noeviction, not {policy}"
        )


def redis_settings(url: str, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """The arguments of redis-py's clients and connections."""
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    parts = urlsplit(url)
    is_tls = parts.scheme == "rediss"
    options = options_of(parts, "password_file", *(("ca", "cert", "key") if is_tls else ()))
    database = parts.path.strip("/") or "0"
    try:
        host, port = parts.hostname, parts.port or PORT
    except ValueError:
        host, port = None, 0
    if parts.scheme not in ("redis", "rediss") or not host or not database.isdigit():
        raise ConfigError(f"not a Redis URL: {redacted(url)}; redis://HOST:{PORT}/0 is one")
    settings = {
        "host": host,
        "port": port,
        "db": int(database),
        "username": unquote(parts.username) if parts.username else None,
        "password": _password(parts.password, options.get("password_file")),
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
    }
    if is_tls:
        files = {f"ssl_{name}": options.get(option) for name, option in _TLS_FILES}
        settings |= {"ssl": True, "ssl_cert_reqs": "required", "ssl_check_hostname": True, **files}
    return settings


def redacted(url: str) -> str:
    """The URL without its user, password and options, to be shown."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def options_of(url: SplitResult, *known: str) -> dict[str, str]:
    """The URL's query as a mapping; an option nobody knows raises `ConfigError`."""
    options = {name: values[-1] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
    unknown = sorted(options.keys() - set(known))
    if unknown:
        names = ", ".join(known) or "none"
        raise ConfigError(f"unknown option {unknown[0]} of {url.scheme}://; known: {names}")
    return options


def _password(in_url: str | None, file: str | None) -> str | None:
    if file is None:
        return unquote(in_url) if in_url else None
    try:
        return Path(file).read_text().strip()
    except OSError as error:
        raise ConfigError(f"cannot read the Redis password file {file}: {error.strerror}") from error
