"""Spans of time by name: recorded while a profile is taken, next to free otherwise.

with span("draft"):          on the thread that computes; spans nest, the outermost one is a step
with beside("transfer in"):  what goes on beside the steps, on any thread or task
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import ParamSpec, Protocol, TypeVar

from tandem.errors import ConfigError

P = ParamSpec("P")
T = TypeVar("T")


class Recorder(Protocol):
    """What takes a profile (tandem.profiling.recording)."""

    def span(self, name: str) -> AbstractContextManager[None]: ...

    def beside(self, name: str) -> AbstractContextManager[None]: ...

    def end(self) -> None: ...


_NOTHING = nullcontext()
_recorder: Recorder | None = None


def install(recorder: Recorder) -> None:
    """Everything in this process is told to `recorder` from now on. Raises `ConfigError` if another is."""
    global _recorder
    if _recorder is not None:
        raise ConfigError("this process takes a profile already; profile workers in processes of their own")
    _recorder = recorder


def uninstall() -> None:
    """Nothing is recorded any more."""
    global _recorder
    _recorder = None


def span(name: str) -> AbstractContextManager[None]:
    """A stretch of the thread that computes."""
    return _NOTHING if _recorder is None else _recorder.span(name)


def beside(name: str) -> AbstractContextManager[None]:
    """A stretch of something that goes on beside the steps."""
    return _NOTHING if _recorder is None else _recorder.beside(name)


def traced(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Each call of the function is a span."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> T:
            with span(name):
                return function(*args, **kwargs)

        return run

    return decorate


def steps(name: str, is_work: Callable[[], bool]) -> Iterator[None]:
    """One item each time there is work: what is done with it is a step. The end is that of the thread."""
    while is_work():
        with span(name):
            yield
    if _recorder is not None:
        _recorder.end()
