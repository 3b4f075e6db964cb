"""A request under a name that was answered lately has the seeds it had, or is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from router import answered
from router.answered import WINDOW_S, AnsweredNames
from tandem.errors import AlreadyExists
from tandem.request import Request, child_id
from tandem.sampling import SamplingParams
from tests.clock import ManualClock

ASKED = Request(
    request_id="acme/again",
    token_ids=(5, 6, 7),
    num_prompt_tokens=3,
    sampling=SamplingParams(temperature=1.0, max_tokens=9),
    max_tokens=9,
    seed=11,
    deadline_s=0.0,
    is_named=True,
    tenant="acme",
)


def children(seed: int) -> list[Request]:
    return [replace(ASKED, request_id=child_id(ASKED.request_id, i), seed=seed + i) for i in range(3)]


def test_a_name_is_remembered_for_a_while() -> None:
    clock = ManualClock()
    names = AnsweredNames(clock)
    assert names.again([ASKED]) is None
    names.note(ASKED)
    clock.advance(WINDOW_S - 1)
    assert names.again([replace(ASKED, seed=99)]) == [ASKED]
    clock.advance(2)
    assert names.again([ASKED]) is None
    assert len(names) == 0


def test_a_name_that_the_router_made_up_is_not_remembered() -> None:
    names = AnsweredNames()
    names.note(replace(ASKED, is_named=False))
    assert len(names) == 0


def test_one_that_goes_on_from_what_it_has_is_the_same_request() -> None:
    names = AnsweredNames()
    names.note(replace(ASKED, token_ids=(5, 6, 7, 1, 2)))
    resumed = replace(ASKED, token_ids=(5, 6, 7, 1))
    assert names.again([resumed]) == [resumed]


@pytest.mark.parametrize(
    "change",
    [{"token_ids": (5, 6, 8)}, {"max_tokens": 8}, {"sampling": SamplingParams(temperature=0.5)}],
    ids=["prompt", "length", "sampling"],
)
def test_another_request_under_the_name_is_refused(change) -> None:
    names = AnsweredNames()
    names.note(ASKED)
    with pytest.raises(AlreadyExists, match="take a name of its own") as refusal:
        names.again([replace(ASKED, **change)])
    assert refusal.value.reason == "ID_REUSED_DIFFERENT_BODY"
    assert names.again([replace(ASKED, request_id="other/again", **change)]) is None


def test_all_completions_of_a_request_have_the_seeds_they_had() -> None:
    names, first = AnsweredNames(), children(seed=11)
    for child in reversed(first):
        names.note(child)
    assert len(names) == 1
    assert names.again(children(seed=99)) == first


def test_the_oldest_names_are_forgotten_first(monkeypatch) -> None:
    monkeypatch.setattr(answered, "MOST_NAMES", 2)
    names, (a, b, c) = AnsweredNames(), (replace(ASKED, request_id=name) for name in "abc")
    for request in (a, b, a, c):  # `a` was answered again after `b`
        names.note(request)
    assert [names.again([request]) for request in (a, b, c)] == [[a], None, [c]]
