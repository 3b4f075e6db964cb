"""The pair that is found in a few steps is the one that a walk over all workers would find."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.fleet import Fleet, Pool
from router.policy import POLICIES, LeastLoaded, Route
from router.registry import WorkerRole
from tandem.ledger import Ledger
from tests.router.workers import decode_worker, prefill_worker

FINGERPRINTS = (b"f" * 32, b"g" * 32)
WORKER = st.tuples(
    st.booleans(),  # a prefill worker
    st.sampled_from(FINGERPRINTS),
    st.integers(1, 20),  # blocks
    st.integers(0, 20),  # of them taken, at most
    st.integers(0, 3),  # queued tokens
    st.booleans(),  # accepts work
)


def fleet_of(workers, policy=None) -> tuple[Fleet, list[Pool]]:
    fleet, pools = Fleet(policy or LeastLoaded()), []
    for number, (is_prefill, fingerprint, blocks, taken, queued, accepting) in enumerate(workers):
        make = prefill_worker if is_prefill else decode_worker
        info = make(f"w{number}", blocks, fingerprint=fingerprint)
        pool = Pool(info, Ledger(info.worker_id, "blocks", blocks))
        fleet.add(pool)
        pools.append(pool)
        if min(taken, blocks):
            assert pool.ledger.reserve("somebody", min(taken, blocks))
        pool.queued_tokens, pool.accepting = queued, accepting
        fleet.changed(pool)
    return fleet, pools


def best_by_walking(pools, prefill_blocks, decode_blocks, exclude):
    usable = [p for p in pools if p.accepting and p.info.worker_id not in exclude]
    prefills = [p for p in usable if p.info.role is WorkerRole.PREFILL and p.ledger.free >= prefill_blocks]
    decodes = [
        d
        for d in usable
        if d.info.role is WorkerRole.DECODE
        and d.ledger.free >= decode_blocks
        and any(d.info.can_exchange_kv(p.info) for p in prefills)
    ]
    if not decodes:
        return None
    decode = min(decodes, key=lambda d: (d.candidate().decode_load, d.info.worker_id))
    fitting = [p for p in prefills if p.info.can_exchange_kv(decode.info)]
    return min(fitting, key=lambda p: (p.candidate().prefill_load, p.info.worker_id)), decode


@given(
    workers=st.lists(WORKER, max_size=12),
    prefill_blocks=st.integers(1, 12),
    decode_blocks=st.integers(1, 12),
    excluded=st.sets(st.integers(0, 11), max_size=3),
)
def test_the_best_pair(workers, prefill_blocks, decode_blocks, excluded):
    fleet, pools = fleet_of(workers)
    exclude = {f"w{number}" for number in excluded}
    expected = best_by_walking(pools, prefill_blocks, decode_blocks, exclude)
    assert fleet.best_pair(prefill_blocks, decode_blocks, exclude) == expected
    assert fleet.best_pair(prefill_blocks, decode_blocks, exclude) == expected, "asking changes nothing"


@given(workers=st.lists(WORKER, max_size=8), gone=st.sets(st.integers(0, 7)))
def test_lost_workers_are_never_found(workers, gone):
    fleet, pools = fleet_of(workers)
    for number in gone:
        fleet.remove(f"w{number}")
    left = [p for number, p in enumerate(pools) if number not in gone]
    assert fleet.best_pair(1, 1, ()) == best_by_walking(left, 1, 1, ())
    assert list(fleet) == sorted(left, key=lambda p: p.info.worker_id)


ROUTES = st.builds(
    Route,
    request_id=st.text(max_size=5),
    session=st.sampled_from(["", "a", "b", "c"]),
    cached_tokens=st.dictionaries(st.sampled_from([f"w{n}" for n in range(12)]), st.integers(0, 500)),
)


@given(
    policy=st.sampled_from(sorted(POLICIES)),
    route=ROUTES,
    workers=st.lists(WORKER, max_size=12),
    prefill_blocks=st.integers(1, 12),
    decode_blocks=st.integers(1, 12),
    excluded=st.sets(st.integers(0, 11), max_size=3),
)
def test_every_policy_takes_a_pair_with_room_if_there_is_one(
    policy, route, workers, prefill_blocks, decode_blocks, excluded
):
    """Never one that is full, excluded, draining or of another build; and asking twice is the same."""
    fleet, pools = fleet_of(workers, POLICIES[policy]())
    exclude = {f"w{number}" for number in excluded}
    pair = fleet.best_pair(prefill_blocks, decode_blocks, exclude, route)
    assert pair == fleet.best_pair(prefill_blocks, decode_blocks, exclude, route)
    assert (pair is None) == (best_by_walking(pools, prefill_blocks, decode_blocks, exclude) is None)
    if pair is None:
        return
    for pool, role, blocks in zip(
        pair, (WorkerRole.PREFILL, WorkerRole.DECODE), (prefill_blocks, decode_blocks), strict=True
    ):
        assert pool.info.role is role
        assert pool.accepting
        assert pool.info.worker_id not in exclude
        assert pool.ledger.free >= blocks
    assert pair[0].info.can_exchange_kv(pair[1].info)
