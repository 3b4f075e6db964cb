"""A task that needs no data: the N best simple paths of a weighted digraph, as a tool call.

Graphs are drawn from a seed. Gold are the N simple paths of the least weight (Yen, 1971, in networkx); a
graph is drawn again unless they are the only ones. Score: |predicted ∩ gold| / N, of the first N predicted.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench.quality.model import Model
from bench.quality.task import Grade, Problem, Setting
from tandem.errors import ConfigError

TOOL = "submit_paths"
MAX_TOKENS = 256
STOPS = ("\n\n",)
MAX_WEIGHT = 20
MAX_CHARS = 10_000  # of an answer that are read
DEGREE = 3  # edges that leave a node

Path = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PathProblem(Problem):
    gold: frozenset[Path]


@dataclass(slots=True)
class BestPaths:
    """Answers are graded by the JSON in them, whatever stands around it."""

    problems: Sequence[PathProblem]
    name: str
    metric: str = "share of gold paths"

    async def prepare(self) -> None:
        """Nothing is run."""

    async def answer(self, model: Model, problem: Problem, setting: Setting, seed: int) -> str:
        return await model.complete(problem.prompt, setting.sampling(MAX_TOKENS, STOPS, seed))

    async def grade(self, problem: Problem, answer: str) -> Grade:
        assert isinstance(problem, PathProblem)
        paths = submitted(answer)
        if paths is None:
            return Grade(0.0, "no tool call with paths")
        first = list(dict.fromkeys(paths))[: len(problem.gold)]
        found = len(problem.gold.intersection(first))
        why = "" if found == len(problem.gold) else f"{found} of {len(problem.gold)} paths"
        return Grade(found / len(problem.gold), why)


def best_paths(count: int, nodes: int, num_paths: int, seed: int) -> BestPaths:
    """`count` problems; the same seed draws the same. Raises `ConfigError`."""
    if nodes < 4:
        raise ConfigError(f"a graph with {nodes} nodes has too few paths; give at least 4")
    rng = random.Random(f"paths {seed}")
    problems = [_problem(str(number), nodes, num_paths, rng) for number in range(count)]
    return BestPaths(problems, f"{num_paths} best paths of {nodes} nodes")


def submitted(answer: str) -> list[Path] | None:
    """The paths of the first tool call in a text; None if there is none."""
    for value in _objects(answer[:MAX_CHARS]):
        arguments = value.get("arguments", value.get("parameters", value))
        if isinstance(arguments, str):  # as OpenAI's API writes them
            arguments = next(_objects(arguments), None)
        paths = arguments.get("paths") if isinstance(arguments, dict) else None
        if isinstance(paths, list) and value.get("name", TOOL) == TOOL:
            return [tuple(path) for path in paths if _is_path(path)]
    return None


def _is_path(value: object) -> bool:
    return isinstance(value, list) and all(type(node) is int for node in value)


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The outermost JSON objects of a text."""
    decoder, place = json.JSONDecoder(), text.find("{")
    while place >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            end = place + 1
        else:
            if isinstance(value, dict):
                yield value
        place = text.find("{", end)


def _problem(id_: str, nodes: int, num_paths: int, rng: random.Random) -> PathProblem:
    for _ in range(1000):
        edges = _edges(nodes, rng)
        gold = _gold(edges, nodes - 1, num_paths)
        if gold:
            right, wrong = (_call(paths) for paths in (gold, [gold[0][::-1]]))
            return PathProblem(id_, _prompt(edges, nodes, num_paths), right, wrong, frozenset(gold))
    raise ConfigError(f"no graph of {nodes} nodes has {num_paths} best paths; ask for fewer, or more nodes")


def _edges(nodes: int, rng: random.Random) -> list[tuple[int, int, int]]:
    found = []
    for source in range(nodes):
        targets = rng.sample([node for node in range(nodes) if node != source], DEGREE)
        found += [(source, target, rng.randint(1, MAX_WEIGHT)) for target in sorted(targets)]
    return found


def _gold(edges: Sequence[tuple[int, int, int]], target: int, num_paths: int) -> list[Path]:
    """From node 0, lightest first; empty if there are fewer or others are as light."""
    try:
        import networkx as nx
    except ImportError as error:
        raise ConfigError("this task needs networkx: pip install 'tandem-serve[bench]'") from error
    graph = nx.DiGraph()
    graph.add_weighted_edges_from(edges)
    try:
        found = list(itertools.islice(nx.shortest_simple_paths(graph, 0, target, "weight"), num_paths + 1))
    except nx.NetworkXNoPath:
        return []
    weights = [nx.path_weight(graph, path, "weight") for path in found]
    if len(found) < num_paths or weights[num_paths - 1 :][:1] == weights[num_paths:]:
        return []
    return [tuple(path) for path in found[:num_paths]]


def _prompt(edges: Sequence[tuple[int, int, int]], nodes: int, num_paths: int) -> str:
    listed = "\n".join(f"{source} -> {target}: {weight}" for source, target, weight in edges)
    example = _call([(0, 2, 1), (0, 1)])
    return (
        f"A weighted directed graph has the nodes 0 to {nodes - 1} and these edges (from -> to: weight):\n"
        f"{listed}\n"
        f"Find the {num_paths} paths from 0 to {nodes - 1} with the least total weight, lightest first, in "
        f"which no node comes twice. Answer with one call of the tool {TOOL} and nothing else, like this:\n"
        f"{example}\nAnswer:\n"
    )


def _call(paths: Sequence[Path]) -> str:
    return json.dumps({"name": TOOL, "arguments": {"paths": paths}})
