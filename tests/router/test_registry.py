"""Workers come, fall silent, drain, restart and go; listeners hear of each exactly once."""

from __future__ import annotations

import pytest

from router.registry import Registry, WorkerInfo, WorkerRole, WorkerState
from tandem.errors import FailedPrecondition, InvalidRequest
from tandem.pb.worker.v1 import worker_pb2
from tandem.registration import WorkerLoad
from tests.clock import ManualClock
from tests.router.workers import FINGERPRINT, decode_worker, prefill_worker

BUSY = WorkerLoad(free_blocks=5, num_running=3, num_waiting=1)


class Heard(list):
    """Everything a listener was told, in order."""

    def follow(self, registry: Registry) -> Heard:
        registry.subscribe(
            on_join=lambda info: self.append(("join", info.worker_id, info.incarnation)),
            on_loss=lambda info: self.append(("loss", info.worker_id, info.incarnation)),
            on_state=lambda info, state: self.append((state.value, info.worker_id, info.incarnation)),
        )
        return self


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def registry(clock):
    return Registry(0.5, 2.0, clock, fingerprint=FINGERPRINT)


@pytest.fixture
def heard(registry):
    return Heard().follow(registry)


def test_a_registered_worker_is_ready_for_its_role(registry, heard):
    registry.register(decode_worker("d1"))
    registry.register(decode_worker("d0"))
    registry.register(prefill_worker("p0"))
    assert [w.worker_id for w in registry.ready(WorkerRole.DECODE)] == ["d0", "d1"]
    assert [w.worker_id for w in registry.ready(WorkerRole.PREFILL)] == ["p0"]
    assert registry.get("d0") == decode_worker("d0")
    assert registry.get("d9") is None
    assert [event for event, *_ in heard] == ["join"] * 3


def test_registering_the_same_start_again_is_a_heartbeat(registry, heard, clock):
    registry.register(decode_worker())
    clock.advance(1.9)
    registry.register(decode_worker())
    clock.advance(1.0)
    assert registry.expire() == []
    assert heard == [("join", "d0", "1")]


def test_a_new_incarnation_means_the_old_one_is_lost_first(registry, heard):
    registry.register(decode_worker(incarnation="1"))
    registry.register(decode_worker(incarnation="2"))
    assert heard == [("join", "d0", "1"), ("loss", "d0", "1"), ("join", "d0", "2")]
    assert not registry.heartbeat("d0", "1", BUSY)
    assert registry.heartbeat("d0", "2", BUSY)


def test_a_worker_that_changed_under_the_same_incarnation_is_taken_for_a_new_one(registry, heard):
    registry.register(decode_worker(num_blocks=10))
    registry.register(decode_worker(num_blocks=20))
    assert [event for event, *_ in heard] == ["join", "loss", "join"]


def test_another_fingerprint_is_refused(registry, heard):
    with pytest.raises(FailedPrecondition, match="FINGERPRINT_MISMATCH"):
        registry.register(decode_worker(fingerprint=b"other"))
    assert heard == []
    Registry(0.5, 2.0).register(decode_worker(fingerprint=b"other"))  # nothing expected, nothing refused


def test_silence_makes_a_suspect_and_then_a_loss(registry, heard, clock):
    registry.register(decode_worker())
    clock.advance(1.2)
    assert registry.expire() == []
    assert registry.ready(WorkerRole.DECODE)
    clock.advance(0.1)
    assert registry.expire() == []
    assert registry.ready(WorkerRole.DECODE) == []
    clock.advance(0.7)
    assert registry.expire() == [decode_worker()]
    assert registry.expire() == []
    assert [event for event, *_ in heard] == ["join", "suspect", "loss"]
    assert not registry.heartbeat("d0", "1", BUSY), "it must register again"


def test_a_suspect_that_speaks_is_ready_again(registry, heard, clock):
    registry.register(decode_worker())
    clock.advance(1.5)
    registry.expire()
    assert registry.heartbeat("d0", "1", BUSY)
    assert registry.ready(WorkerRole.DECODE)
    assert [event for event, *_ in heard] == ["join", "suspect", "ready"]


def test_a_draining_worker_gets_no_new_work_and_is_not_lost(registry, heard, clock):
    registry.register(decode_worker())
    for _ in range(10):
        clock.advance(0.5)
        assert registry.heartbeat("d0", "1", WorkerLoad(draining=True))
        assert registry.expire() == []
    assert registry.ready(WorkerRole.DECODE) == []
    assert [event for event, *_ in heard] == ["join", "draining"]
    clock.advance(2.0)
    assert registry.expire() == [decode_worker()]


def test_a_broken_connection_loses_a_worker_at_once(registry, heard):
    registry.register(decode_worker(incarnation="2"))
    assert not registry.lose("d0", "1"), "news of an earlier start changes nothing"
    assert registry.lose("d0", "2")
    assert not registry.lose("d0", "2")
    assert [event for event, *_ in heard] == ["join", "loss"]


def test_a_late_listener_hears_of_those_already_here(registry):
    registry.register(decode_worker())
    registry.register(prefill_worker())
    assert [name for _, name, _ in Heard().follow(registry)] == ["d0", "p0"]


def test_views_show_load_and_silence(registry, clock):
    registry.register(decode_worker())
    registry.heartbeat("d0", "1", BUSY)
    clock.advance(0.25)
    (view,) = registry.views()
    assert (view.info, view.state, view.load) == (decode_worker(), WorkerState.READY, BUSY)
    assert view.silent_s == 0.25


# --- on the wire -----------------------------------------------------------------------------------


@pytest.mark.parametrize("info", [decode_worker(), prefill_worker("p-1.a", incarnation="x")])
def test_a_description_survives_the_wire(info):
    message = worker_pb2.WorkerInfo.FromString(info.to_pb().SerializeToString())
    assert WorkerInfo.from_pb(message) == info


@pytest.mark.parametrize(
    "changes",
    [
        {"worker_id": ""},
        {"worker_id": "../d0"},
        {"incarnation": ""},
        {"address": ""},
        {"role": worker_pb2.WORKER_ROLE_UNSPECIFIED},
        {"role": 77},
        {"block_size": 0},
        {"num_blocks": 0},
        {"block_bytes": 0},
    ],
)
def test_a_senseless_description_is_refused(changes):
    message = decode_worker().to_pb()
    for name, value in changes.items():
        setattr(message, name, value)
    with pytest.raises(InvalidRequest, match="BAD_MESSAGE"):
        WorkerInfo.from_pb(message)


def test_a_heartbeat_becomes_a_load():
    message = worker_pb2.HeartbeatRequest(free_blocks=5, num_running=3, num_waiting=1, draining=True)
    assert WorkerLoad.from_pb(message) == WorkerLoad(5, 3, 1, True)
    message.prompt_token_s = 0.25
    assert WorkerLoad.from_pb(message).prompt_token_s == 0.25


def test_workers_exchange_kv_only_if_both_builds_and_blocks_agree():
    assert prefill_worker().can_exchange_kv(decode_worker())
    assert not prefill_worker(fingerprint=b"g").can_exchange_kv(decode_worker())
    assert not prefill_worker(block_size=32).can_exchange_kv(decode_worker())
