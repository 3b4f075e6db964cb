"""Who may talk to the public listeners: bearer tokens, TLS, and which addresses need them.

Tokens live in a file, one a line, and are compared in constant time; a line may say whose token it is. The
certificates and keys are read once, at start: a file that is missing, empty or open to others is said then.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import ssl
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import grpc

from tandem.config import SecurityConfig
from tandem.errors import ConfigError, Unauthenticated

SCHEME = b"bearer"
TENANT_MARK = " tenant="
TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One line of the tokens' file: `TOKEN`, or `TOKEN tenant=NAME`."""

    token: str
    tenant: str = ""  # callers whose lines name none share this one

    @classmethod
    def parse(cls, line: str) -> Self:
        """Raises `ConfigError` for a name that cannot be one."""
        token, mark, tenant = line.rpartition(TENANT_MARK)
        if not mark:
            return cls(line)
        if not TENANT.fullmatch(tenant) or not token.strip():
            raise ConfigError(
                "a line of the tokens' file must be TOKEN or TOKEN tenant=NAME, with a name "
                f"of up to 64 of A-Z a-z 0-9 . _ -, not tenant={tenant}"
            )
        return cls(token.strip(), tenant)


class BearerTokens:
    """The accepted tokens and whose they are. Only digests of them are kept."""

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self._tenants = {_digest(key.token.encode()): key.tenant for key in keys}

    @classmethod
    def from_file(cls, file: Path) -> Self:
        """The tokens of `read_tokens`."""
        return cls(read_tokens(file))

    def check(self, authorization: bytes | None) -> str:
        """Whose token it is. Raises `Unauthenticated` unless the header is `Bearer` and an accepted one."""
        if not authorization:
            raise Unauthenticated("NO_TOKEN", "missing bearer token")
        scheme, _, token = authorization.partition(b" ")
        digest = _digest(token.strip())
        # Every token is compared, so that the time says nothing about which one came close.
        matches = [tenant for known, tenant in self._tenants.items() if hmac.compare_digest(digest, known)]
        if scheme.lower() != SCHEME or not matches:
            raise Unauthenticated("BAD_TOKEN", "token not accepted")
        return matches[0]


def read_tokens(file: Path) -> list[ApiKey]:
    """One token a line; empty lines and lines that begin with # do not count. Raises `ConfigError`."""
    lines = [line.strip() for line in read_secret(file).decode("utf-8", "replace").splitlines()]
    tokens = [line for line in lines if line and not line.startswith("#")]
    if not tokens:
        raise ConfigError(f"{file} holds no token; write one a line (openssl rand -hex 32 makes one)")
    keys = [ApiKey.parse(token) for token in tokens]
    if len({key.token for key in keys}) < len({(key.token, key.tenant) for key in keys}):
        raise ConfigError(f"{file} gives one token to two tenants")
    return keys


def tokens_of(security: SecurityConfig) -> BearerTokens | None:
    """The configured tokens; None if everybody who can connect may call."""
    return BearerTokens.from_file(security.api_key_file) if security.api_key_file else None


def check_exposure(host: str, security: SecurityConfig) -> None:
    """Raise `ConfigError` for an address others can reach, unless tokens and TLS guard it."""
    guarded = security.api_key_file is not None and security.tls_cert is not None
    if not (is_loopback(host) or guarded or security.insecure):
        raise ConfigError(
            f"refusing to listen on {host} without tokens and TLS: give --api-key-file, --tls-cert and "
            "--tls-key, or bind 127.0.0.1; --insecure listens all the same"
        )


def check_security(host: str, security: SecurityConfig) -> None:
    """Raise `ConfigError` for what would end a listener on `host` when it starts."""
    check_exposure(host, security)
    tokens_of(security)
    server_credentials(security)


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def server_credentials(security: SecurityConfig) -> grpc.ServerCredentials | None:
    """TLS of a gRPC listener; with a client CA only clients that have its certificates get in."""
    if security.tls_cert is None or security.tls_key is None:
        return None
    check_pair(security.tls_cert, security.tls_key)
    ca = read_public(security.tls_client_ca) if security.tls_client_ca else None
    pair = (read_secret(security.tls_key), read_public(security.tls_cert))
    return grpc.ssl_server_credentials([pair], root_certificates=ca, require_client_auth=ca is not None)


def client_credentials(
    ca: Path | None = None, cert: Path | None = None, key: Path | None = None
) -> grpc.ChannelCredentials:
    """TLS of a client: trusts `ca` (or the system's authorities), and shows `cert` where asked for one."""
    if (cert is None) != (key is None):
        raise ConfigError("a TLS certificate needs its key, and a key its certificate")
    if cert and key:
        check_pair(cert, key)
    return grpc.ssl_channel_credentials(
        root_certificates=read_public(ca) if ca else None,
        private_key=read_secret(key) if key else None,
        certificate_chain=read_public(cert) if cert else None,
    )


def check_pair(cert: Path, key: Path) -> None:
    """Raise `ConfigError` unless the files hold a certificate and its key. gRPC would only log that."""
    read_public(cert)
    read_secret(key)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"{cert} and {key} are not a certificate and its key in PEM form") from error


def read_public(file: Path) -> bytes:
    """A file's bytes, or `ConfigError` if there are none."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    if not content.strip():
        raise ConfigError(f"{file} is empty")
    return content


def read_secret(file: Path) -> bytes:
    """The same for what other users of the machine must not read."""
    content = read_public(file)
    if file.stat().st_mode & (stat.S_IROTH | stat.S_IWOTH):
        raise ConfigError(f"{file} is open to every user of this machine; run chmod o-rw {file}")
    return content


def _digest(token: bytes) -> bytes:
    """Of one length whatever the token's, which `compare_digest` needs to tell nothing."""
    return hashlib.sha256(token).digest()
