"""The window of a profile: which spans are in it, and when it closes."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.errors import ConfigError
from tandem.profiling import recording, spans
from tandem.profiling.recording import Recording


class Instruments:
    """Counters that go on by one at every look; what was called is kept."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._count = 0.0

    def open(self) -> None:
        self.calls.append("open")

    def close(self) -> None:
        self.calls.append("close")

    def enter(self, name: str) -> None:
        self.calls.append(f"enter {name}")

    def leave(self) -> None:
        self.calls.append("leave")

    def counters(self) -> tuple[float, ...]:
        self._count += 1
        return (self._count,)


@pytest.fixture
def installed():
    """Installs recordings of so many steps; nothing is left behind."""
    ended: list[Recording] = []

    def install(num_steps: int) -> tuple[Recording, Instruments, list[Recording]]:
        instruments = Instruments()
        made = Recording(num_steps, instruments, lambda: ended.append(made))
        spans.install(made)
        return made, instruments, ended

    yield install
    spans.uninstall()


def test_without_a_profile_a_span_is_nothing():
    with spans.span("step") as inside, spans.beside("transfer"):
        assert inside is None


@given(num_steps=st.integers(1, 5), depths=st.lists(st.integers(0, 3), max_size=8))
def test_outermost_spans_are_steps_until_there_are_enough(num_steps, depths):
    """Each of `depths` is a step with so many spans within each other in it."""
    instruments, ended = Instruments(), []
    made = Recording(num_steps, instruments, lambda: ended.append(1))
    for depth in depths:
        _nest(made, ["step", "verify", "kernel", "part"][: depth + 1])
    kept = depths[:num_steps]
    assert [span.depth for span in made.spans] == [d for depth in kept for d in range(depth, -1, -1)]
    assert all(span.parts[0] > 0 and span.end_ns >= span.start_ns for span in made.spans)
    assert len(ended) == (len(depths) >= num_steps)
    assert instruments.calls.count("open") == bool(depths)
    assert instruments.calls.count("close") == len(ended)


def _nest(made: Recording, names: list[str]) -> None:
    if names:
        with made.span(names[0]):
            _nest(made, names[1:])


def test_another_threads_spans_are_not_recorded(installed):
    made, _, _ = installed(3)
    with spans.span("mine"):
        pass
    thread = threading.Thread(target=_nest, args=(made, ["theirs", "inner"]))
    thread.start()
    thread.join()
    assert [span.name for span in made.spans] == ["mine"]


def test_the_end_of_the_computing_thread_closes_the_window_once(installed):
    made, instruments, ended = installed(100)
    work = iter([True, True, False])
    thread = threading.Thread(target=lambda: list(spans.steps("step", lambda: next(work))))
    thread.start()
    thread.join()
    assert [span.name for span in made.spans] == ["step", "step"]
    assert ended == [made]
    assert instruments.calls[-1] == "close"
    made.end()
    assert ended == [made]


def test_a_step_that_fails_is_recorded_too(installed):
    made, _, _ = installed(3)
    with pytest.raises(ZeroDivisionError), spans.span("step"), spans.span("verify"):
        raise ZeroDivisionError
    assert [span.name for span in made.spans] == ["verify", "step"]


def test_transfers_count_while_the_window_is_open_and_not_for_ever(installed, monkeypatch):
    monkeypatch.setattr(recording, "MAX_BESIDE", 2)
    made, _, _ = installed(2)
    for moment in range(2):
        with spans.beside(f"before {moment}"):
            pass
    with spans.span("step"):
        for _ in range(3):
            with spans.beside("transfer in"):
                pass
    assert [span.name for span in made.beside_spans] == ["transfer in"] * 2
    assert made.num_beside_left_out == 1
    with spans.span("step"):
        pass
    with spans.beside("after"):
        pass
    assert made.num_beside_left_out == 1


def test_a_traced_function_is_a_span(installed):
    made, _, _ = installed(2)
    assert spans.traced("double")(lambda x: 2 * x)(4) == 8
    assert [span.name for span in made.spans] == ["double"]


def test_one_process_takes_one_profile(installed):
    installed(1)
    with pytest.raises(ConfigError, match="takes a profile already"):
        installed(1)
