"""What every backend must do, then what each does when its medium fails."""

from __future__ import annotations

import errno
import os
import random
import signal
import stat
import subprocess
import sys
import time

import pytest

from kvstore.backend import Mappable, Placeable
from kvstore.backends import redis as redis_backend
from kvstore.files import PREFIX, remove_leftovers
from kvstore.key import ObjectKey
from kvstore.objects import ObjectState
from kvstore.store import KvStore
from kvstore.urls import backend_from_url
from kvstore.wire import encode
from tandem.config import KvStoreConfig
from tandem.errors import ConfigError, FailedPrecondition, InvalidRequest, Overloaded, Unavailable
from tandem.redis_url import TIMEOUT_S, redacted
from tests import certificates, redis_server
from tests.clock import ManualClock
from tests.kvstore.backends import SCHEMES, medium
from tests.kvstore.samples import make_header, make_sample, put

KEY, OTHER = ObjectKey(b"\x01" * 16, 1), ObjectKey(b"\x01" * 16, 2)
MESSAGES = [random.Random(seed).randbytes(size) for seed, size in enumerate((1, 100, 1 << 20, 7))]
SAMPLE = make_sample()
SIZE = SAMPLE.header.total_bytes


@pytest.fixture(params=SCHEMES)
def place(request, tmp_path):
    with medium(request.param, tmp_path) as place:
        yield place


@pytest.fixture
def backend(place):
    backend = place.open()
    yield backend
    backend.close()
    assert place.contents(backend) == []


@pytest.fixture
def server(tmp_path):
    with redis_server.running(tmp_path) as server:
        yield server


def put_until_full(backend):
    for index in range(8):
        backend.put(KEY, index, bytes(1 << 20))


def put_all(backend, key=KEY):
    for index, message in enumerate(MESSAGES):
        backend.put(key, index, message)


def test_messages_come_back_as_they_were_put(backend):
    put_all(backend)
    assert [backend.get(KEY, index) for index in (3, 1, 2, 0)] == [MESSAGES[index] for index in (3, 1, 2, 0)]


def test_attempts_at_an_object_are_kept_apart(backend, place):
    backend.put(KEY, 0, b"one")
    backend.put(OTHER, 0, b"another")
    backend.delete(KEY)
    assert backend.get(OTHER, 0) == b"another"
    assert len(place.contents(backend)) == 1


def test_deleting_what_is_not_there_is_fine(backend, place):
    backend.delete(KEY)
    put_all(backend)
    backend.delete(KEY)
    backend.delete(KEY)
    assert place.contents(backend) == []


def test_a_store_leaves_nothing_behind(place):
    clock = ManualClock()
    backend = place.open()
    store = KvStore(backend, 4 * SIZE, KvStoreConfig(), clock)
    handle = put(store, SAMPLE)
    lease = store.lease(handle, "reader")
    assert list(store.read(lease)) == SAMPLE.frames
    put(store, make_sample(make_header(b"\x02" * 16)))
    store.reserve(make_header(b"\x03" * 16))
    num_reserved = int(isinstance(backend, Placeable))  # which has a place for it already
    assert len(place.contents(backend)) == 2 + num_reserved
    clock.advance(1000)
    store.sweep()
    assert store.audit().is_empty
    assert place.contents(backend) == []
    put(store, make_sample(make_header(b"\x04" * 16)))
    store.close()
    assert place.contents(backend) == []


def test_every_url_is_checked(tmp_path):
    file = tmp_path / "file"
    file.touch()
    bad = ["", "memory", "zip://x", "disk://", "disk:///", "disk://host/x", "shm:///x", "memory://?a=1"]
    bad += [f"disk://{file}", "redis://", "redis://host:x/0", "redis://host/name", "redis://host/?nope=1"]
    bad += ["rediss://host/?password_file=/nowhere/at/all"]
    for url in bad:
        with pytest.raises(ConfigError):
            backend_from_url(url)


# --- files ---


@pytest.mark.parametrize("scheme", ["disk", "shm"])
def test_only_the_owner_can_read_and_nobody_can_guess(scheme, tmp_path):
    with medium(scheme, tmp_path) as place:
        backend = place.open()
        put_all(backend)
        path = backend._files[KEY].path
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert len(path.name) == 32
        assert len(path.parent.name) == len(PREFIX) + 32
        backend.close()


@pytest.mark.parametrize("scheme", ["disk", "shm"])
def test_an_object_can_be_mapped_where_it_lies(scheme, tmp_path):
    with medium(scheme, tmp_path) as place:
        backend = place.open()
        put_all(backend)
        assert isinstance(backend, Mappable)
        location = backend.locate(KEY)
        with open(location.path, "rb") as file:
            data = file.read()
        starts = (0, *location.ends)
        assert [data[a:b] for a, b in zip(starts, location.ends, strict=False)] == MESSAGES
        backend.close()


CRASH = """
import sys
from kvstore.urls import backend_from_url
from kvstore.key import ObjectKey
backend = backend_from_url(sys.argv[1])
backend.put(ObjectKey(bytes(16), 1), 0, b"left behind")
print(backend._folder, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("scheme", ["disk", "shm"])
def test_what_a_killed_store_left_is_removed_and_a_living_one_is_not_touched(scheme, tmp_path):
    with medium(scheme, tmp_path) as place:
        command = [sys.executable, "-c", CRASH, place.url]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            folder = process.stdout.readline().strip()
            second = place.open()
            assert len(os.listdir(folder)) == 2  # its lock and its object
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert len(os.listdir(folder)) == 2
            third = place.open()
            assert not os.path.exists(folder)
        second.put(KEY, 0, b"alive")
        assert second.get(KEY, 0) == b"alive"
        second.close()
        third.close()


def test_a_planted_link_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").touch()
    (tmp_path / f"{PREFIX}{'0' * 32}").mkdir()
    (tmp_path / f"{PREFIX}{'0' * 32}" / ".lock").symlink_to(victim / "precious")
    assert remove_leftovers(tmp_path) == 0
    assert (victim / "precious").exists()


@pytest.mark.parametrize(
    ("number", "error", "reason"),
    [(errno.ENOSPC, Overloaded, "NO_MEMORY_FIT_NOW"), (errno.EIO, Unavailable, "STORE_DOWN")],
)
def test_a_disk_that_fails_is_refused_and_charged_to_nobody(tmp_path, monkeypatch, number, error, reason):
    store = KvStore(backend_from_url(f"disk://{tmp_path}"), 4 * SIZE, KvStoreConfig(), ManualClock())
    ticket = store.reserve(SAMPLE.header)

    def fail(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        chunk, payload = SAMPLE.chunks[0]
        with pytest.raises(error, match=reason):
            store.append(ticket, chunk, payload, b"message")
    with pytest.raises(InvalidRequest):
        store.seal(ticket, SAMPLE.seal)
    assert store.abort(ticket)
    assert store.audit().is_empty
    if number == errno.ENOSPC:
        put(store, SAMPLE)
    else:
        with pytest.raises(Unavailable, match="STORE_DOWN"):
            put(store, SAMPLE)
    store.close()


def test_what_a_bad_disk_has_is_believed_as_far_as_its_digests_hold(tmp_path, monkeypatch):
    """And what it never had is not sealed."""
    store = KvStore(backend_from_url(f"disk://{tmp_path}"), 4 * SIZE, KvStoreConfig(), ManualClock())
    handle = put(store, SAMPLE)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", _no_io)
        with pytest.raises(Unavailable):
            put(store, make_sample(make_header(b"\x02" * 16)))
    assert list(store.read(store.lease(handle, "reader"))) == SAMPLE.frames
    with pytest.raises(Unavailable, match="STORE_DOWN"):
        put(store, make_sample(make_header(b"\x03" * 16)))
    assert [obj.key for obj in store.list_objects(9) if obj.state is not ObjectState.RESERVED] == [handle.key]
    store.close()


def test_memory_over_a_bad_disk_goes_on(tmp_path, monkeypatch):
    message_bytes = len(encode(*SAMPLE.chunks[0])) * 2
    url = f"memory://?bytes={2 * message_bytes}+disk://{tmp_path}"
    store = KvStore(backend_from_url(url), 8 * SIZE, KvStoreConfig(), ManualClock())
    monkeypatch.setattr(os, "pwrite", _no_io)
    first = put(store, SAMPLE)
    more = [make_sample(make_header(bytes([number]) * 16)) for number in range(2, 6)]
    with pytest.raises(Unavailable):
        [put(store, sample) for sample in more]
    assert list(store.read(store.lease(first, "reader"))) == SAMPLE.frames
    store.close()


def _no_io(*_):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_full_disk_for_real(tmp_path):
    """A limit on file sizes stops a write in the middle, as a full disk does."""
    script = """
import resource, signal, sys
from kvstore.urls import backend_from_url
from kvstore.key import ObjectKey
from tandem.errors import Overloaded
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
backend = backend_from_url(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
key = ObjectKey(bytes(16), 1)
backend.put(key, 0, bytes(900))
try:
    backend.put(key, 1, bytes(900))
except Overloaded:
    assert backend.get(key, 0) == bytes(900)
    backend.close()
    print("refused")
"""
    command = [sys.executable, "-c", script, f"disk://{tmp_path}"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "refused\n"


@pytest.mark.parametrize("scheme", ["disk", "shm"])
def test_an_object_that_vanished_is_stale(scheme, tmp_path):
    with medium(scheme, tmp_path) as place:
        backend = place.open()
        put_all(backend)
        os.truncate(backend._files[KEY].path, 50)
        with pytest.raises(FailedPrecondition, match="STALE_HANDLE"):
            backend.get(KEY, 1)
        backend._files[KEY].path.unlink()
        with pytest.raises(FailedPrecondition, match="STALE_HANDLE"):
            backend.get(KEY, 0)
        backend.delete(KEY)
        backend.close()


# --- Redis ---


@pytest.mark.redis
class TestRedis:
    def test_every_key_has_a_time_to_live_and_one_key_is_one_object(self, server):
        backend = backend_from_url(server.url)
        put_all(backend)
        with server.client() as client:
            (name,) = server.key_names()
            assert name.startswith(b"v1:kv:")
            assert 0 < client.ttl(name) <= redis_backend.TTL_S
            client.expire(name, 5)
            backend.get(KEY, 0)
            assert client.ttl(name) > 5
        backend.close()

    def test_a_flushed_or_forged_object_is_stale(self, server):
        backend = backend_from_url(server.url)
        put_all(backend)
        with server.client() as client:
            client.hset(server.key_names()[0], 0, b"longer than it was")
            with pytest.raises(FailedPrecondition, match="STALE_HANDLE"):
                backend.get(KEY, 0)
            client.flushall()
        with pytest.raises(FailedPrecondition, match="STALE_HANDLE"):
            backend.get(KEY, 1)
        backend.close()

    def test_a_killed_server_is_store_down_and_a_new_one_is_used(self, server):
        store = KvStore(backend_from_url(server.url), 4 * SIZE, KvStoreConfig(), ManualClock())
        handle = put(store, SAMPLE)
        server.kill()
        lease = store.lease(handle, "reader")
        with pytest.raises(Unavailable, match="STORE_DOWN"):
            list(store.read(lease))
        other = make_sample(make_header(b"\x02" * 16))
        with pytest.raises(Unavailable, match="STORE_DOWN"):
            put(store, other)
        assert store.release(handle, "reader")
        assert store.release(handle)
        store.check_integrity()
        server.start()
        third = make_sample(make_header(b"\x03" * 16))
        assert list(store.read(store.lease(put(store, third), "reader"))) == third.frames
        store.close()

    @pytest.mark.slow
    def test_a_silent_server_costs_its_time_limit(self, server):
        backend = backend_from_url(server.url)
        put_all(backend)
        server.hold_still()
        started_s = time.monotonic()
        with pytest.raises(Unavailable, match="STORE_DOWN"):
            backend.get(KEY, 0)
        assert time.monotonic() - started_s < 3 * TIMEOUT_S
        server.go_on()
        assert [backend.get(KEY, index) for index in range(4)] == MESSAGES  # of this command, no earlier one
        backend.close()

    def test_a_full_server_refuses(self, tmp_path):
        limit = ("--maxmemory", "4mb", "--maxmemory-policy", "noeviction")
        with redis_server.running(tmp_path, *limit) as server:
            backend = backend_from_url(server.url)
            with pytest.raises(Overloaded, match="NO_MEMORY_FIT_NOW"):
                put_until_full(backend)
            backend.delete(KEY)
            backend.put(OTHER, 0, b"room again")
            backend.close()

    def test_a_server_that_evicts_is_refused_at_start(self, tmp_path):
        evicting = redis_server.running(tmp_path, "--maxmemory-policy", "allkeys-lru")
        with evicting as server, pytest.raises(ConfigError, match="noeviction"):
            backend_from_url(server.url)

    def test_over_tls_only_the_right_authority_is_believed(self, tmp_path):
        ours, other = certificates.self_signed("redis"), certificates.self_signed("another")
        files = ("--tls-cert-file", str(ours.cert), "--tls-key-file", str(ours.key))
        with redis_server.running(tmp_path, *files, "--tls-auth-clients", "no", tls=True) as server:
            backend = backend_from_url(f"{server.tls_url}?ca={ours.cert}")
            put_all(backend)
            assert [backend.get(KEY, index) for index in range(4)] == MESSAGES
            backend.close()
            for ca in (f"?ca={other.cert}", ""):
                with pytest.raises(ConfigError, match="CERTIFICATE_VERIFY_FAILED"):
                    backend_from_url(server.tls_url + ca)

    def test_a_user_with_few_rights_is_enough(self, server, tmp_path):
        with server.client() as client:
            rights = ["~v1:*", "+hset", "+hget", "+pexpire", "+unlink", "+info"]
            client.execute_command("ACL", "SETUSER", "kv", "on", ">its:own@secret", *rights)
        file = tmp_path / "password"
        file.write_text("its:own@secret\n")
        for login in ("kv:its%3Aown%40secret@", "kv@"):
            option = "" if ":" in login else f"?password_file={file}"
            backend = backend_from_url(f"redis://{login}127.0.0.1:{server.port}/0{option}")
            put_all(backend)
            assert [backend.get(KEY, index) for index in range(4)] == MESSAGES
            backend.close()
            assert server.key_names() == []

    def test_a_refusal_shows_no_password(self, server):
        with pytest.raises(ConfigError) as wrong:
            backend_from_url(server.url.replace("horse", "donkey"))
        server.kill()
        with pytest.raises(ConfigError) as down:
            backend_from_url(server.url)
        for error in (wrong, down):
            assert "correct" not in str(error.value)
            assert "127.0.0.1" in str(error.value)


def test_no_secret_is_shown():
    url = "redis://user:secret@host:6379/1?password_file=/etc/key"
    assert redacted(url) == "redis://host:6379/1"
    assert "secret" not in repr(KvStoreConfig(url=url))
    with pytest.raises(ConfigError) as error:
        backend_from_url(url.replace("redis:", "rebis:"))
    assert "secret" not in str(error.value)


def test_without_its_package_redis_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ConfigError, match=r"tandem-serve\[redis\]"):
        backend_from_url("redis://host/0")
