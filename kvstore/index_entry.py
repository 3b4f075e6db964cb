"""An entry of the shared prefix index: which store holds a piece, under a name that says whose it is.

The value is an HMAC-SHA256 over the entry's name and a msgpack array of fixed fields, so that an entry that
was planted, changed or moved to another name is told from ours without being believed in anything. Equal
entries have equal bytes.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass

import msgpack

from kvstore.key import OBJECT_ID_BYTES
from tandem.config_index import IndexConfig
from tandem.errors import ConfigError
from tandem.security import read_secret

MAX_ENTRY_BYTES = 4 << 10
MIN_KEY_BYTES = 32
MAC_BYTES = 32
VERSION = 1


@dataclass(frozen=True, slots=True)
class Place:
    """Where a piece lies: in one life of one store."""

    address: str  # host:port
    object_id: bytes
    store_epoch: int
    num_tokens: int


class BadEntry(Exception):
    """Not an entry that one of our stores wrote there."""


class EntryForm:
    """Names entries, writes and reads them with the key that all stores share."""

    def __init__(self, key: bytes) -> None:
        self._key = hmac.digest(key, b"tandem index entries", "sha256")
        self._tenants = hmac.digest(key, b"tandem index tenants", "sha256")
        self.names_secret = hmac.digest(
            key, b"tandem piece names", "sha256"
        )  # the stores' salts come from it

    @classmethod
    def of(cls, config: IndexConfig) -> EntryForm:
        """With the key of the file. Raises `ConfigError`."""
        assert config.key_file is not None
        key = read_secret(config.key_file).strip()
        if len(key) < MIN_KEY_BYTES:
            raise ConfigError(
                f"{config.key_file} must hold at least {MIN_KEY_BYTES} bytes; openssl rand -hex 32 makes it"
            )
        return cls(key)

    def name(self, fingerprint: bytes, tenant: str, object_id: bytes) -> str:
        """`v1:FINGERPRINT:TENANT:PIECE`, each in hex."""
        tenant_hash = hmac.digest(self._tenants, tenant.encode(), "sha256")[:16]
        return f"v1:{fingerprint.hex()}:{tenant_hash.hex()}:{object_id.hex()}"

    def pack(self, name: str, place: Place) -> bytes:
        fields = [VERSION, place.address, place.object_id, place.store_epoch, place.num_tokens]
        body: bytes = msgpack.packb(fields)
        return self._mac(name, body) + body

    def unpack(self, name: str, value: object) -> tuple[Place, bytes]:
        """What the value under this name says, and the value. Raises `BadEntry`."""
        if not isinstance(value, bytes) or not MAC_BYTES < len(value) <= MAX_ENTRY_BYTES:
            raise BadEntry
        mac, body = value[:MAC_BYTES], value[MAC_BYTES:]
        if not hmac.compare_digest(mac, self._mac(name, body)):
            raise BadEntry
        try:
            fields = msgpack.unpackb(body, max_array_len=5, max_map_len=0, max_ext_len=0)
        except ValueError as error:
            raise BadEntry from error
        if not isinstance(fields, list) or [type(each) for each in fields] != [int, str, bytes, int, int]:
            raise BadEntry
        version, place = fields[0], Place(*fields[1:])
        if version != VERSION or len(place.object_id) != OBJECT_ID_BYTES:
            raise BadEntry
        if place.object_id.hex() != name.rpartition(":")[2]:
            raise BadEntry
        return place, value

    def _mac(self, name: str, body: bytes) -> bytes:
        return hmac.digest(self._key, name.encode() + b"\0" + body, "sha256")
