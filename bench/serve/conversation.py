"""Conversations: requests whose later turns bring their whole context with them, after a pause.

The context of a turn is the prompts and answers of all before it. So a service that keeps sessions together
and knows the beginnings of prompts computes only what was said anew.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.serve.workload import Lengths, LoadRequest, Synthetic
from tandem.errors import ConfigError

CLASS_SEEDS = 1_000_003  # apart, so that classes share no random tokens


@dataclass(frozen=True, slots=True)
class Talk:
    """How many turns conversations have, and the mean of the pauses, which are exponential."""

    turns: Lengths
    think_s: float = 1.0

    def __post_init__(self) -> None:
        if self.think_s < 0:
            raise ConfigError(f"the time to think must be at least 0 s, not {self.think_s:g}")

    @property
    def is_one(self) -> bool:
        """Whether every conversation is one request."""
        return self.turns.text == "1"

    def pause(self, rng: random.Random) -> float:
        return rng.expovariate(1 / self.think_s) if self.think_s else 0.0


@dataclass(frozen=True, slots=True)
class RequestClass:
    """A kind of synthetic request: its share of all, and its lengths."""

    name: str
    share: float
    input_lengths: str
    output_lengths: str


def parse_class(text: str) -> RequestClass:
    """`interactive:share=0.8,input=uniform:16-512,output=64`. Raises `ConfigError`."""
    name, _, rest = text.partition(":")
    values = dict(part.partition("=")[::2] for part in re.split(r",(?=[a-z]+=)", rest))
    try:
        share = float(values["share"])
        if not name or not share > 0 or values.keys() != {"share", "input", "output"}:
            raise ValueError(text)
    except (KeyError, ValueError):
        like = "interactive:share=0.8,input=uniform:16-512,output=64"
        raise ConfigError(f"classes are like {like}; not {text}") from None
    return RequestClass(name, share, values["input"], values["output"])


def of_classes(
    made: Synthetic, classes: Sequence[RequestClass], talk: Talk, count: int, seed: int
) -> list[LoadRequest]:
    """Conversations of `count` turns together, of each class by its share, in random order."""
    whole, done, found = sum(one.share for one in classes), 0.0, list[LoadRequest]()
    for number, one in enumerate(classes):
        before, done = done, done + one.share
        num_own = round(count * done / whole) - round(count * before / whole)
        lengths = Lengths(one.input_lengths), Lengths(one.output_lengths)
        own = replace(made, input_lengths=lengths[0], output_lengths=lengths[1])
        talks = synthetic(own, talk, num_own, seed + CLASS_SEEDS * (number + 1))
        found += [_named(request, one.name) for request in talks]
    random.Random(f"{seed}/classes").shuffle(found)
    return found


def synthetic(made: Synthetic, talk: Talk, count: int, seed: int) -> list[LoadRequest]:
    """Conversations of `count` turns together. Only first turns have a shared beginning.

    A conversation ends early where the next turn would not fit the context.
    """
    rng, found = random.Random(f"{seed}/turns"), list[LoadRequest]()
    firsts = made.requests(count, seed)
    if talk.is_one:
        return firsts
    later = iter(replace(made, prefix_share=0.0).requests(count, rng.getrandbits(32)))
    while count > 0:
        num_turns = min(talk.turns.draw(rng), count)
        turns = [firsts[len(found)], *itertools.islice(later, num_turns - 1)]
        found.append(chained(_fitting(turns, made.max_context), talk, rng, f"{seed}-{len(found)}"))
        count -= found[-1].num_turns
    return found


def chained(turns: Sequence[LoadRequest], talk: Talk, rng: random.Random, session: str) -> LoadRequest:
    """The first turn, with the others behind it."""
    last: LoadRequest | None = None
    for number in reversed(range(len(turns))):
        pause_s = talk.pause(rng) if number else 0.0
        last = replace(turns[number], session=session, then=last, think_s=pause_s)
    assert last is not None, "a conversation has a turn"
    return last


def first_turns(requests: Sequence[LoadRequest], count: int) -> list[LoadRequest]:
    """Whole conversations, as many as `count` turns begin."""
    found = []
    for request in requests:
        if count <= 0:
            break
        found.append(request)
        count -= request.num_turns
    return found


def _named(request: LoadRequest, name: str) -> LoadRequest:
    """All its turns are of the class."""
    return replace(request, request_class=name, then=request.then and _named(request.then, name))


def _fitting(turns: Sequence[LoadRequest], max_context: int) -> list[LoadRequest]:
    """At least the first."""
    fitting, total = list[LoadRequest](), 0
    for turn in turns:
        total += len(turn.prompt) + turn.max_tokens
        if fitting and total > max_context:
            break
        fitting.append(turn)
    return fitting
