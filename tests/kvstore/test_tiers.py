"""Tiers keep every byte, keep to their budgets, and move what was used least recently."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvstore.backend import Mappable
from kvstore.backends.memory import MemoryBackend
from kvstore.key import ObjectKey
from kvstore.tiers import TieredBackend
from kvstore.urls import backend_from_url
from tandem.errors import ConfigError, Overloaded, Unavailable
from tests import redis_server
from tests.kvstore.backends import SCHEMES, medium
from tests.kvstore.test_service import PAYLOAD, big, put, serving

KEYS = [ObjectKey(bytes([number]) * 16, 1) for number in range(5)]
ONE, TWO, THREE = KEYS[:3]
BUDGET = 100


@pytest.fixture
def tiers():
    tiers = TieredBackend(MemoryBackend(), BUDGET, MemoryBackend())
    yield tiers
    for key in KEYS:
        tiers.delete(key)
    assert above(tiers) == below(tiers) == set()
    assert tiers._used_bytes == 0


def above(tiers):
    return set(tiers._upper._messages)


def below(tiers):
    return set(tiers._lower._messages)


def test_the_least_recently_used_moves_down(tiers):
    for key in (ONE, TWO, THREE):
        tiers.put(key, 0, bytes(30))
    tiers.get(ONE, 0)
    tiers.put(KEYS[3], 0, bytes(30))
    assert (above(tiers), below(tiers)) == ({ONE, THREE, KEYS[3]}, {TWO})


def test_what_is_read_again_moves_up(tiers):
    for key in (ONE, TWO):
        tiers.put(key, 0, bytes([key.object_id[0]]) * 40)
        tiers.put(key, 1, bytes(20))
    assert below(tiers) == {ONE}
    assert [tiers.get(ONE, index) for index in (0, 1)] == [bytes(40), bytes(20)]
    assert below(tiers) == {ONE}
    assert [tiers.get(ONE, index) for index in (0, 1)] == [bytes(40), bytes(20)]
    assert (above(tiers), below(tiers)) == ({ONE}, {TWO})
    assert (tiers.num_demoted, tiers.num_promoted) == (2, 1)


def test_an_object_that_outgrows_the_tier_goes_on_below(tiers):
    messages = [bytes([index]) * 40 for index in range(4)]
    for index, message in enumerate(messages):
        tiers.put(ONE, index, message)
    assert below(tiers) == {ONE}
    for _ in range(3):
        assert [tiers.get(ONE, index) for index in range(4)] == messages


class Failing(MemoryBackend):
    """Takes so many messages and then fails."""

    def __init__(self, num_good: int, error: Exception) -> None:
        super().__init__()
        self.num_good, self.error = num_good, error

    def put(self, key, index, message):
        if self.num_good <= 0:
            raise self.error
        self.num_good -= 1
        super().put(key, index, message)


@pytest.mark.parametrize(
    "error",
    [Overloaded("NO_MEMORY_FIT_NOW", "full"), Unavailable("STORE_DOWN", "gone")],
    ids=["full", "gone"],
)
def test_a_lower_tier_that_fails_loses_nothing(error):
    tiers = TieredBackend(MemoryBackend(), BUDGET, Failing(1, error))
    tiers.put(ONE, 0, b"a" * 50)
    tiers.put(ONE, 1, b"b" * 40)
    with pytest.raises(type(error)):
        tiers.put(TWO, 0, bytes(50))
    assert (above(tiers), below(tiers)) == ({ONE}, set())
    assert [tiers.get(ONE, index) for index in (0, 1)] == [b"a" * 50, b"b" * 40]
    tiers.delete(TWO)
    tiers.put(TWO, 0, bytes(10))
    assert tiers.get(TWO, 0) == bytes(10)


class TiersMachine(RuleBasedStateMachine):
    """Any operations, against a dictionary; the budget and the medium below hold three objects' worth."""

    def __init__(self) -> None:
        super().__init__()
        self.tiers = TieredBackend(
            MemoryBackend(), BUDGET, TieredBackend(MemoryBackend(), 60, MemoryBackend())
        )
        self.kept: dict[ObjectKey, list[bytes]] = {}
        self.serial = 0

    @rule(key=st.sampled_from(KEYS), size=st.sampled_from([1, 10, 35, 70, 120]))
    def put(self, key, size) -> None:
        self.serial += 1
        message = self.serial.to_bytes(4, "little") * size
        message = message[:size]
        self.tiers.put(key, len(self.kept.get(key, ())), message)
        self.kept.setdefault(key, []).append(message)

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def get(self, data) -> None:
        key = data.draw(st.sampled_from(sorted(self.kept)))
        for index in data.draw(st.sampled_from([range(len(self.kept[key])), [0]])):
            assert self.tiers.get(key, index) == self.kept[key][index]

    @rule(key=st.sampled_from(KEYS))
    def delete(self, key) -> None:
        self.tiers.delete(key)
        self.kept.pop(key, None)

    @invariant()
    def books_agree(self) -> None:
        held = {key: sum(map(len, messages)) for key, messages in self.tiers._upper._messages.items()}
        assert sum(held.values()) == self.tiers._used_bytes <= BUDGET
        lower = self.tiers._lower
        assert held.keys() | lower._sizes.keys() | lower._below.keys() == self.kept.keys()
        assert not held.keys() & (lower._sizes.keys() | lower._below.keys())


def test_random_operations_keep_every_byte():
    quick = settings(
        max_examples=25, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(TiersMachine, settings=quick)


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_objects_cross_memory_over_every_backend(scheme, tmp_path):
    with medium(scheme, tmp_path) as place:
        backend = backend_from_url(f"memory://?bytes={3 << 20}+{place.url}")
        async with serving(backend=backend) as service, service.client() as client:
            handles = [await put(client, big(2, number)) for number in range(4)]
            for handle in handles * 3:
                payloads = [payload async for _, payload in client.get(handle, "reader")]
                assert all(payload == PAYLOAD for payload in payloads)
            assert backend.num_demoted > 3
            assert backend.num_promoted > 0
            for handle in handles:
                await client.release(handle)
        assert place.contents(backend._lower) == []
        service.store.close()


async def test_shared_memory_over_disk_is_mapped(tmp_path):
    backend = backend_from_url(f"shm://?bytes={3 << 20}+disk://{tmp_path}")
    assert isinstance(backend, Mappable)
    async with serving(backend=backend) as service, service.client() as client:
        handles = [await put(client, big(size, number)) for number, size in enumerate((2, 2, 4))]
        for handle in handles:  # the last one is too large to be mapped
            payloads = [payload async for _, payload in client.get(handle, "reader")]
            assert all(payload == PAYLOAD for payload in payloads)
            assert client._may_map
        for handle in handles:
            assert service.store.stat(handle).num_leases in (0, 1)
            await client.release(handle)
    service.store.close()


@pytest.mark.redis
def test_a_tier_that_cannot_be_opened_leaves_nothing_open(tmp_path):
    with redis_server.running(tmp_path) as server:
        server.kill()
        with pytest.raises(ConfigError):
            backend_from_url(f"disk://{tmp_path}/kv?bytes=100+{server.url}")
    assert list((tmp_path / "kv").iterdir()) == []


def test_every_tier_but_the_last_needs_its_size(tmp_path):
    below = f"disk://{tmp_path}"
    for url in (f"memory://+{below}", f"memory://?bytes=0+{below}", f"memory://?bytes=much+{below}"):
        with pytest.raises(ConfigError, match="bytes"):
            backend_from_url(url)
    for url in (
        f"memory://?bytes=5&a=b+{below}",
        f"memory://?bytes=5+{below}?bytes=7",
        "memory://?bytes=5+zip://",
    ):
        with pytest.raises(ConfigError):
            backend_from_url(url)
