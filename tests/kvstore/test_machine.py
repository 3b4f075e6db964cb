"""Random schedules of every operation, late and repeated ones too, against a small model of the store.

Also with one rule of the store broken on purpose, to show that the checks would notice.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from kvstore.backends.memory import MemoryBackend
from kvstore.books import SEALED, WRITER, Books
from kvstore.files import FileBackend
from kvstore.key import KvHandle, ObjectKey
from kvstore.objects import Lease, ObjectState, PutTicket
from kvstore.records import ChunkHeader, Placed
from kvstore.store import KvStore
from kvstore.tiers import TieredBackend
from kvstore.urls import backend_from_url
from kvstore.wire import encode
from tandem.config import KvStoreConfig
from tandem.errors import FailedPrecondition, InvalidRequest, NotFound, Overloaded, TandemError
from tests.clock import ManualClock
from tests.kvstore.backends import SCHEMES, medium
from tests.kvstore.samples import Sample, make_header, make_sample

PUT_S, LEASE_S = 10.0, 30.0
CONFIG = KvStoreConfig(put_deadline_s=PUT_S, lease_s=LEASE_S)
IDS = [bytes([number]) * 16 for number in range(3)]
SIZE = make_header().total_bytes
TIERS = {  # of two objects each
    "tiers": f"memory://?bytes={2 * SIZE}+",
    "mapped tiers": f"shm://?bytes={2 * make_header().most_message_bytes}+",
}
TOTAL = 4 * SIZE + 100  # a fifth object does not fit
REFUSED = (FailedPrecondition, NotFound, Overloaded, InvalidRequest)
SECONDS = st.sampled_from([0.5, 0.5, 3.0, 3.0, 9.0, 11.0, 31.0])


@dataclass
class Model:
    """What the store should believe of one object."""

    sample: Sample
    deadline_s: float
    num_chunks: int = 0
    is_sealed: bool = False
    is_given_up: bool = False
    leases: dict[str, float] = field(default_factory=dict)

    @property
    def state(self) -> ObjectState:
        if not self.is_sealed:
            return ObjectState.RESERVED
        if self.is_given_up:
            return ObjectState.RELEASED
        return ObjectState.LEASED if self.leases else ObjectState.SEALED

    def is_over(self, now_s: float) -> bool:
        """Drop what is due; whether that ended the object."""
        if not self.leases:
            return self.deadline_s <= now_s
        self.leases = {holder: end_s for holder, end_s in self.leases.items() if end_s > now_s}
        return not self.leases


Put = tuple[PutTicket, Sample, Model]


def messages_in(backend) -> dict[ObjectKey, int]:
    """How many messages a backend keeps of each object."""
    if isinstance(backend, TieredBackend):
        return messages_in(backend._upper) | messages_in(backend._lower)
    if isinstance(backend, MemoryBackend):
        return {key: len(messages) for key, messages in backend._messages.items()}
    if isinstance(backend, FileBackend):
        assert {path.name for path in backend._folder.iterdir()} == {
            ".lock",
            *(file.path.name for file in backend._files.values()),
            *(path.name for path in getattr(backend, "_free", ())),
        }
        return {key: len(file.ends) for key, file in backend._files.items() if file.ends}
    assert backend._redis.dbsize() == len(backend._lengths)
    return {key: len(lengths) for key, lengths in backend._lengths.items()}


class StoreMachine(RuleBasedStateMachine):
    url = "memory://"
    num_steps = 0

    @initialize()
    def start(self) -> None:
        self.clock = ManualClock()
        self.tickets: list[Put] = []
        self.handles: list[KvHandle] = []
        self.restart()

    @rule(luck=st.integers(0, 9))
    def perhaps_restart(self, luck: int) -> None:
        if luck == 0:
            self.restart()

    def restart(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
        self.store = KvStore(backend_from_url(self.url), TOTAL, CONFIG, self.clock)
        self.tickets = []  # a ticket is a thing of one process; handles outlive it
        self.leases: list[tuple[Lease, Model]] = []
        self.objects: dict[ObjectKey, Model] = {}
        self.highest: dict[bytes, int] = {}

    def expire(self) -> None:
        over = [key for key, model in self.objects.items() if model.is_over(self.clock())]
        for key in over:
            del self.objects[key]

    def live(self, model: Model | None) -> bool:
        return model is not None and any(model is other for other in self.objects.values())

    def check(self, expected: bool, operation, *arguments):
        """The operation succeeds exactly if the model says so; a refusal changes nothing."""
        try:
            result = operation(*arguments)
        except REFUSED:
            assert not expected, (operation, arguments)
            return None
        assert expected, (operation, arguments)
        return result

    @rule(seconds=SECONDS, sweep=st.booleans())
    def wait(self, seconds: float, sweep: bool) -> None:
        self.clock.advance(seconds)
        self.expire()
        if sweep:
            self.store.sweep()

    @rule(
        object_id=st.sampled_from(IDS),
        step=st.sampled_from([-1, 0, 0, 1, 1]),
        seed=st.integers(0, 1),
        whole=st.booleans(),
        holders=st.sampled_from(["", "a", "ab"]),
    )
    def put(self, object_id: bytes, step: int, seed: int, whole: bool, holders: str) -> None:
        epoch = max(0, self.highest.get(object_id, 0) + step)
        sample = make_sample(make_header(object_id, epoch=epoch), seed)
        picked = self.reserve(sample)
        if picked and whole:
            self.write_the_rest(*picked)
            handle = self.seal(*picked)
            for holder in holders if handle else ():
                self.lease_to(handle, holder, LEASE_S)

    def reserve(self, sample: Sample) -> Put | None:
        """A put may begin if no later attempt is known, nobody is writing it, and it fits."""
        key = sample.header.key
        may = key.epoch >= self.highest.get(key.object_id, 0)
        if may:
            self.overtake(key.object_id, key.epoch)
        existing = self.objects.get(key)
        if existing:
            may = may and existing.state in (ObjectState.SEALED, ObjectState.LEASED)
        else:
            may = may and (len(self.objects) + 1) * SIZE <= TOTAL
        ticket = self.check(may, self.store.reserve, sample.header)
        if ticket is None:
            return None
        model = self.objects.setdefault(key, Model(sample, self.clock() + PUT_S))
        self.tickets.append((ticket, sample, model))
        return self.tickets[-1]

    def overtake(self, object_id: bytes, epoch: int) -> None:
        """No attempt below `epoch` may write any more."""
        for other, model in list(self.objects.items()):
            if other.object_id == object_id and other.epoch < epoch and not model.is_sealed:
                del self.objects[other]
        self.highest[object_id] = max(epoch, self.highest.get(object_id, 0))

    def pick(self, data, items, is_live):
        """Mostly one that is still good; the others are tried often enough."""
        if data.draw(st.integers(0, 4)):
            items = [item for item in items if is_live(item)] or items
        return data.draw(st.sampled_from(items)) if items else None

    def pick_ticket(self, data) -> Put | None:
        return self.pick(data, self.tickets, lambda put: self.live(put[2]) and not put[0].is_repeat)

    def pick_handle(self, data) -> KvHandle | None:
        return self.pick(data, self.handles, self.target)

    def pick_lease(self, data) -> tuple[Lease, Model] | None:
        return self.pick(data, self.leases, lambda lease: self.live(lease[1]))

    @rule(data=st.data())
    def append(self, data) -> None:
        picked = self.pick_ticket(data)
        if picked is None:
            return
        ticket, sample, model = picked
        index = data.draw(st.integers(0, len(sample.chunks) - 1))
        chunk = sample.chunks[index]
        may = self.live(model) and index == len(ticket.assembly.digests)
        if ticket.is_repeat:
            may = may and not model.is_given_up and sample == model.sample
        self.check(may, self.keep, data.draw(st.booleans()), ticket, chunk)
        if may and not ticket.is_repeat:
            model.num_chunks += 1
            model.deadline_s = self.clock() + PUT_S

    @rule(data=st.data())
    def complete(self, data) -> None:
        picked = self.pick_ticket(data)
        if picked and data.draw(st.booleans()):
            self.write_the_rest(*picked)
        if picked:
            self.seal(*picked)

    def keep(self, is_placed: bool, ticket: PutTicket, chunk: tuple[ChunkHeader, bytes]) -> None:
        """As a writer elsewhere, or as one that fills the object's file where it has one."""
        message = encode(*chunk)
        backend = getattr(self.store._backend, "_upper", self.store._backend)
        file = getattr(backend, "_files", {}).get(ticket.object.key) if is_placed else None
        path = self.store.places.for_writer(ticket) if file else None
        if path is None or file is None:
            self.store.append(ticket, *chunk, message)
            return
        with path.open("r+b") as stream:
            stream.seek(file.size)
            stream.write(message)
        self.store.append_placed(ticket, Placed(end=file.size + len(message)))

    def write_the_rest(self, ticket: PutTicket, sample: Sample, model: Model) -> None:
        for chunk in sample.chunks[len(ticket.assembly.digests) :]:
            try:
                self.keep(chunk[0].index % 2 == 1, ticket, chunk)
            except TandemError:
                break
            if not ticket.is_repeat:
                model.num_chunks += 1
                model.deadline_s = self.clock() + PUT_S

    def seal(self, ticket: PutTicket, sample: Sample, model: Model) -> KvHandle | None:
        was_repeat = ticket.is_repeat
        may = self.live(model) and not model.is_given_up and sample == model.sample
        may = may and len(ticket.assembly.digests) == len(sample.chunks)
        handle = self.check(may, self.store.seal, ticket, sample.seal)
        if handle:
            self.handles.append(handle)
            if not was_repeat:
                model.is_sealed = True
                model.deadline_s = self.clock() + LEASE_S
        return handle

    @rule(data=st.data())
    def abort(self, data) -> None:
        picked = self.pick_ticket(data)
        if picked is None:
            return
        ticket, sample, model = picked
        expected = self.live(model) and not model.is_sealed and not ticket.is_repeat
        assert self.store.abort(ticket) == expected
        if expected:
            del self.objects[sample.header.key]

    def target(self, handle: KvHandle) -> Model | None:
        return self.objects.get(handle.key) if handle.store_epoch == self.store.store_epoch else None

    @rule(data=st.data(), holder=st.sampled_from("ab"), seconds=SECONDS)
    def lease(self, data, holder: str, seconds: float) -> None:
        handle = self.pick_handle(data)
        if handle is not None:
            self.lease_to(handle, holder, seconds)

    def lease_to(self, handle: KvHandle, holder: str, seconds: float) -> None:
        model = self.target(handle)
        may = model is not None and model.state in (ObjectState.SEALED, ObjectState.LEASED)
        lease = self.check(may, self.store.lease, handle, holder, seconds)
        if lease:
            model.leases[holder] = self.clock() + seconds
            self.leases = [(other, m) for other, m in self.leases if m is not model or other.holder != holder]
            self.leases.append((lease, model))

    @rule(data=st.data())
    def read(self, data) -> None:
        picked = self.pick_lease(data)
        if picked is None:
            return
        lease, model = picked
        may = self.live(model) and lease.holder in model.leases
        frames = self.check(may, lambda: list(self.store.read(lease)))
        assert frames is None or frames == model.sample.frames

    @rule(data=st.data(), holder=st.sampled_from("ab"), seconds=SECONDS)
    def renew(self, data, holder: str, seconds: float) -> None:
        handle = self.pick_handle(data)
        if handle is None:
            return
        model = self.target(handle)
        may = model is not None and holder in model.leases
        self.check(may, self.store.renew, handle, holder, seconds)
        if may:
            model.leases[holder] = self.clock() + seconds

    def lease_ended(self, model: Model, holder: str) -> None:
        del model.leases[holder]
        self.leases = [(other, m) for other, m in self.leases if m is not model or other.holder != holder]
        model.deadline_s = self.clock() + LEASE_S
        if model.is_given_up and not model.leases:
            del self.objects[model.sample.header.key]

    @rule(data=st.data(), holder=st.sampled_from(["", "a", "b"]))
    def release(self, data, holder: str) -> None:
        handle = self.pick_handle(data)
        if handle is None:
            return
        model = self.target(handle)
        held = model is not None and (holder in model.leases if holder else not model.is_given_up)
        assert self.store.release(handle, holder) == held
        if held and holder:
            self.lease_ended(model, holder)
        elif held:
            model.is_given_up = True
            if not model.leases:
                del self.objects[handle.key]

    @rule(object_id=st.sampled_from(IDS), step=st.sampled_from([-1, 0, 0, 1]))
    def forget(self, object_id: bytes, step: int) -> None:
        key = ObjectKey(object_id, max(0, self.highest.get(object_id, 0) + step))
        model = self.objects.get(key)
        held = model is not None and not model.is_given_up
        assert self.store.forget(key, make_header().tenant) == held
        self.overtake(key.object_id, key.epoch + 1)
        if held and model.is_sealed:
            model.is_given_up = True
            if not model.leases:
                del self.objects[key]

    @rule(data=st.data())
    def end(self, data) -> None:
        picked = self.pick_lease(data)
        if picked is None:
            return
        lease, model = picked
        expected = self.live(model) and lease.holder in model.leases
        assert self.store.end(lease) == expected
        if expected:
            self.lease_ended(model, lease.holder)

    @rule(handle=st.just(make_header().handle(3)), holder=st.sampled_from(["", "a"]))
    def unknown(self, handle: KvHandle, holder: str) -> None:
        late = self.store.counters.late
        strange = replace(handle, object_id=b"\xff" * 16, store_epoch=self.store.store_epoch)
        assert not self.store.release(handle, holder)
        assert not self.store.release(strange, holder)
        assert self.store.counters.late == late + 2
        with pytest.raises(NotFound):
            self.store.stat(strange)
        with pytest.raises(FailedPrecondition):
            self.store.stat(handle)

    @invariant()
    def books_agree(self) -> None:
        type(self).num_steps += 1
        self.store.sweep()
        self.store.check_integrity()
        audit = self.store.audit()
        assert audit.free + audit.owned == TOTAL
        assert audit.owned == len(self.objects) * SIZE
        charged = self.store.bytes_in(ObjectState.RESERVED)
        kept = self.store.bytes_in(ObjectState.SEALED, ObjectState.LEASED, ObjectState.RELEASED)
        assert charged + kept == audit.owned
        for key, model in self.objects.items():
            stat = self.store.stat(model.sample.header.handle(self.store.store_epoch))
            assert (stat.state, stat.num_leases) == (model.state, len(model.leases)), key
        assert messages_in(self.store._backend) == {
            key: model.num_chunks for key, model in self.objects.items() if model.num_chunks
        }

    def teardown(self) -> None:
        """Whatever happened: after release or expiry everything is back."""
        if hasattr(self, "store"):
            self.clock.advance(10 * LEASE_S)
            self.store.sweep()
            assert self.store.audit().is_empty
            self.store.check_integrity()
            assert not messages_in(self.store._backend)
            self.store.close()


STEPS = 50  # of one schedule
# Of each backend. The longest tier is TANDEM_STORE_STEPS=80000 (docs/kvstore.md).
SHORT_STEPS, LONG_STEPS = 4000, int(os.environ.get("TANDEM_STORE_STEPS", "16500"))
SETTINGS = settings(
    max_examples=30, stateful_step_count=STEPS, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_random_schedules_agree_with_the_model():
    run_state_machine_as_test(StoreMachine, settings=SETTINGS)


@pytest.mark.slow
@pytest.mark.timeout(600 + LONG_STEPS // 50)
@pytest.mark.parametrize("num_steps", [SHORT_STEPS, pytest.param(LONG_STEPS, marks=pytest.mark.long)])
@pytest.mark.parametrize("scheme", [*SCHEMES, *TIERS])
def test_many_steps_of_random_schedules_over_every_backend(scheme, num_steps, tmp_path, capsys):
    with medium("disk" if scheme in TIERS else scheme, tmp_path) as place:
        machine = type("Machine", (StoreMachine,), {"url": TIERS.get(scheme, "") + place.url})
        while (missing := num_steps - machine.num_steps) > 0:  # some schedules end early
            long = settings(SETTINGS, max_examples=-(-missing // STEPS), database=None)
            run_state_machine_as_test(machine, settings=long)
    with capsys.disabled():
        print(f"\n{scheme}: {machine.num_steps:,} steps, no invariant broken")


def leak_on_free(self, obj, why):
    self.objects.pop(obj.key)
    for holder in ("", *obj.leases):
        self._expiry.remove((obj.key, holder))


def keep_after_expiry(self, now_s):
    return 0


def lease_without_a_deadline(self, obj, holder, lease_s):
    pass


def seal_without_a_new_deadline(self, obj, seal):
    obj.to(ObjectState.SEALED)
    obj.seal = seal
    self._hold(obj, SEALED)
    self._drop_hold(obj, WRITER)


@pytest.mark.parametrize(
    ("method", "broken"),
    [
        ("free", leak_on_free),
        ("sweep", keep_after_expiry),
        ("renew", lease_without_a_deadline),
        ("seal", seal_without_a_new_deadline),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_planted_bug_is_noticed(monkeypatch, method, broken):
    monkeypatch.setattr(Books, method, broken)
    quick = settings(SETTINGS, max_examples=300, derandomize=True, database=None, phases=[Phase.generate])
    with pytest.raises((AssertionError, ExceptionGroup)):
        run_state_machine_as_test(StoreMachine, settings=quick)
