"""The router's count of what decode workers run and have in line, against a plain list of requests."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from router.decode_loads import DecodeLoads

WORKERS = ("d0", "d1")
REQUESTS = st.lists(
    st.tuples(st.sampled_from(WORKERS), st.integers(0, 300), st.sampled_from(["runs", "computed", "ended"])),
    max_size=12,
)


@given(REQUESTS, st.randoms(use_true_random=False))
def test_agrees_with_a_list_in_any_order_of_ends(requests, random):
    loads = DecodeLoads()
    for number, (worker, tokens, _) in enumerate(requests):
        loads.begin(worker, (f"r{number}", 1), tokens)
    for number in random.sample(range(len(requests)), len(requests)):
        worker, _, state = requests[number]
        if state != "runs":
            loads.computed((f"r{number}", 1))
            loads.computed((f"r{number}", 1))  # its second token
        if state == "ended":
            loads.end(worker, (f"r{number}", 1))
    for worker in WORKERS:
        here = [(tokens, state) for at, tokens, state in requests if at == worker and state != "ended"]
        waiting = [tokens for tokens, state in here if state == "runs" and tokens]
        for most in (1, 150, 300):
            assert loads.tokens_before(worker, most) == sum(tokens for tokens in waiting if tokens <= most)
        assert loads.num_running(worker) == len(here) - len(waiting)


@given(REQUESTS)
def test_nothing_is_left_of_requests_that_have_left(requests):
    loads = DecodeLoads()
    for number, (worker, tokens, _) in enumerate(requests):
        loads.begin(worker, (f"r{number}", 1), tokens)
    for number, (worker, _, _) in enumerate(requests):
        loads.end(worker, (f"r{number}", 1))
    assert not any((loads._num_sequences, loads._lines, loads._workers))
