"""Deadlines in any order, against a plain dict; and a heap that does not grow with renewals."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvstore.expiry import ExpiryHeap
from kvstore.history import History

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, 5), st.integers(0, 50)),
        st.tuples(st.just("remove"), st.integers(0, 5), st.just(0)),
        st.tuples(st.just("pop"), st.just(0), st.integers(0, 50)),
    ),
    max_size=60,
)


@given(OPERATIONS)
def test_agrees_with_a_dict(operations):
    heap: ExpiryHeap[int] = ExpiryHeap()
    model: dict[int, float] = {}
    for operation, key, at_s in operations:
        if operation == "set":
            heap.set(key, at_s)
            model[key] = at_s
        elif operation == "remove":
            heap.remove(key)
            model.pop(key, None)
        else:
            due = {key for key, deadline_s in model.items() if deadline_s <= at_s}
            assert sorted(heap.pop_due(at_s)) == sorted(due)
            model = {key: deadline_s for key, deadline_s in model.items() if key not in due}
        assert len(heap) == len(model)


def test_renewals_and_removals_leave_nothing_behind():
    heap: ExpiryHeap[int] = ExpiryHeap()
    for moment in range(10_000):
        heap.set(0, 1e6 + moment)
        heap.set(moment, 1e6)
        heap.remove(moment - 1)
    assert len(heap) <= 2
    assert len(heap._heap) <= 100


def test_taking_out_while_the_owner_removes_others():
    heap: ExpiryHeap[int] = ExpiryHeap()
    for key in range(200):
        heap.set(key, key)
    seen = []
    for key in heap.pop_due(150):
        seen.append(key)
        heap.remove(key + 1)
    assert seen == list(range(0, 151, 2))


def test_history_forgets_by_age_and_number():
    history = History(remember_s=10.0, max_remembered=3)
    for number in range(5):
        history.note(bytes([number]), "", 1, 0.0)
    assert len(history) == 3
    history.note(b"\x04", "", 0, 5.0)
    assert history.latest(b"\x04").epoch == 1
    history.note(b"\x09", "", 1, 11.0)
    assert len(history) == 1
