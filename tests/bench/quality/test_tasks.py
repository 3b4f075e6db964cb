"""Files to problems, answers to grades."""

from __future__ import annotations

import gzip
import itertools
import json
import math
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.quality import code, gsm8k, mmlu, paths
from bench.quality.estimate import interval, pass_at_k
from bench.quality.run import check, is_sound
from bench.quality.task import GREEDY
from tandem.errors import ConfigError

HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def add(a, b):\n    """Sum."""\n',
    "entry_point": "add",
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
}
MBPP = {
    "text": "Add two numbers.",
    "code": "def add(a, b):\n    return a + b",
    "test_list": ["assert add(1, 2) == 3"],
}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@given(st.data())
def test_pass_at_k_is_the_share_of_choices_with_one_that_passed(data) -> None:
    num_samples = data.draw(st.integers(1, 9))
    num_passed, k = data.draw(st.integers(0, num_samples)), data.draw(st.integers(1, num_samples))
    choices = list(itertools.combinations(range(num_samples), k))
    share = sum(min(choice) < num_passed for choice in choices) / len(choices)
    assert pass_at_k(num_samples, num_passed, k) == pytest.approx(share)


def test_an_interval_is_wilsons() -> None:
    assert interval(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert interval(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    with pytest.raises(ValueError, match="pass@3 of 1 in 2"):
        pass_at_k(2, 1, 3)


async def test_known_answers_are_graded_as_what_they_are() -> None:
    """Every right program of ours passes its tests, every wrong one fails; so do graphs."""
    for task in (code.humaneval(None, None), paths.best_paths(5, 7, 3, 0)):
        results = await check(task)
        assert len(results.items) == 2 * len(task.problems)
        assert is_sound(results), [item for item in results.items if item.why]


async def test_an_unsound_task_is_noticed(tmp_path: Path) -> None:
    broken = {**HUMANEVAL, "canonical_solution": "    return a - b\n"}
    assert not is_sound(await check(code.humaneval(write(tmp_path / "broken.jsonl", [broken]), None)))
    untested = {**HUMANEVAL, "test": "def check(candidate):\n    pass\n"}
    assert not is_sound(await check(code.humaneval(write(tmp_path / "untested.jsonl", [untested]), None)))


async def test_humaneval_is_read_as_it_is_distributed(tmp_path: Path) -> None:
    file = tmp_path / "HumanEval.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps(HUMANEVAL).encode()))
    task = code.humaneval(file, None)
    (problem,) = task.problems
    assert (task.name, problem.prompt) == ("HumanEval", HUMANEVAL["prompt"])
    assert (await task.grade(problem, "    return sum((a, b))")).score == 1
    grade = await task.grade(problem, "    return 4\n")
    assert (grade.score, grade.why) == (0, "AssertionError")


async def test_mbpp_shows_solved_problems_and_asks_for_the_test_split(tmp_path: Path) -> None:
    rows = [{**MBPP, "task_id": number} for number in (1, 2, 3, 4, 10, 11, 12, 510, 511)]
    task = code.mbpp(write(tmp_path / "mbpp.jsonl", rows), None)
    assert [problem.id for problem in task.problems] == ["11", "12", "510"]
    prompt = task.problems[0].prompt
    assert prompt.count("[DONE]") == 3
    assert prompt.endswith("assert add(1, 2) == 3\n[BEGIN]\n")
    assert (await task.grade(task.problems[0], MBPP["code"])).score == 1
    sanitized = {
        "task_id": 7,
        "prompt": "Add.",
        "code": "",
        "test_list": ["assert tau > 6"],
        "test_imports": ["from math import tau"],
    }
    task = code.mbpp(write(tmp_path / "sanitized.jsonl", [sanitized]), None)
    assert (await task.grade(task.problems[0], "")).score == 1


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("So 3 + 4 = 7.\n#### 7", "7"),
        ("#### 1,000", "1000"),
        ("It costs $12.50.", "12.5"),
        ("first 3, then -4", "-4"),
        ("#### 5 apples, not 6", "5"),
        ("none", None),
        ("", None),
    ],
)
def test_the_number_of_a_solution(text: str, number: str | None) -> None:
    assert gsm8k.number_of(text) == (None if number is None else Decimal(number))


async def test_gsm8k_matches_values(tmp_path: Path) -> None:
    rows = [{"question": f"{n} + 1?", "answer": f"It is so.\n#### {n + 1}"} for n in range(3)]
    file = write(tmp_path / "test.jsonl", rows)
    task = gsm8k.gsm8k(file, file, 2, None)
    assert task.problems[2].prompt.count("Answer:") == 3
    assert task.problems[2].prompt.endswith("Question: 2 + 1?\nAnswer:")
    assert is_sound(await check(task))
    assert (await task.grade(task.problems[2], " 3.00")).score == 1


class Likely:
    """Gives one letter the most probability."""

    def __init__(self, letter: str) -> None:
        self.letter = letter

    async def log_likelihood(self, context: str, continuation: str) -> float:
        return -1.0 if continuation == f" {self.letter}" else -2.0


async def test_choices_are_those_of_the_likeliest_letter(tmp_path: Path) -> None:
    table = tmp_path / "test.csv"
    table.write_text('"Two, or three?",2,3,5,7,B\nWhich?,a,b,c,d,D\n')
    lines = write(tmp_path / "test.jsonl", [{"question": "Which?", "choices": ["a", "b"], "answer": 1}])
    task = mmlu.mmlu(table, table, 1, None)
    assert is_sound(await check(task))
    first, second = task.problems
    assert first.prompt == "Two, or three?\nA. 2\nB. 3\nC. 5\nD. 7\nAnswer: B\n\n" * 1 + (
        "Two, or three?\nA. 2\nB. 3\nC. 5\nD. 7\nAnswer:"
    )
    answer = await task.answer(Likely("D"), second, GREEDY, 0)
    assert [(await task.grade(problem, answer)).score for problem in (first, second)] == [0, 1]
    below_header = tmp_path / "header.csv"  # as copies of the data set have it
    below_header.write_text('question,A,B,C,D,answer\n"Two, or three?",2,3,5,7,1\n')
    (same,) = mmlu.mmlu(below_header, None, 5, None).problems
    assert (same.right, same.prompt) == (first.right, "Two, or three?\nA. 2\nB. 3\nC. 5\nD. 7\nAnswer:")
    below_header.write_text("question,A,B,answer\nA comma, without quotes,2,3,1\n")
    with pytest.raises(ConfigError, match=r"header.csv:2 .* \(5 columns, and 4 in the first row\)"):
        mmlu.mmlu(below_header, None, 5, None)
    (only,) = mmlu.mmlu(lines, None, 5, None).problems
    assert (only.right, only.letters) == ("B", "AB")


@pytest.mark.parametrize(
    ("read", "line", "says"),
    [
        (lambda path: code.humaneval(path, None), "{", "test.jsonl:1 is no line of HumanEval's JSONL"),
        (lambda path: code.humaneval(path, None), '{"prompt": ""}', "KeyError: 'entry_point'"),
        (lambda path: code.humaneval(path, None), json.dumps({**HUMANEVAL, "entry_point": "a b"}), "no name"),
        (lambda path: code.humaneval(path, None), "", "has no problems"),
        (
            lambda path: mmlu.mmlu(path, None, 5, None),
            '{"question": "", "choices": ["a", "b"], "answer": 2}',
            "'C'",
        ),
        (lambda path: gsm8k.gsm8k(path.parent / "no", None, 0, None), "", "cannot read"),
    ],
)
def test_a_file_that_is_none_is_named(read, line: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    file.write_text(line)
    with pytest.raises(ConfigError, match=says):
        read(file)


@given(st.integers(0, 10_000))
def test_gold_paths_are_the_lightest_of_all_simple_paths(seed: int) -> None:
    (problem,) = paths.best_paths(1, 6, 2, seed).problems
    lines = problem.prompt.split("\n")
    edges = {}
    for line in lines:
        head, arrow, rest = line.partition(" -> ")
        if arrow and head.isdigit():
            target, _, weight = rest.partition(": ")
            edges[int(head), int(target)] = int(weight)
    found = {}
    for length in range(5):
        for middle in itertools.permutations(range(1, 5), length):
            path = (0, *middle, 5)
            steps = list(itertools.pairwise(path))
            if all(step in edges for step in steps):
                found[path] = sum(edges[step] for step in steps)
    lightest = sorted(found, key=lambda path: found[path])[:2]
    assert problem.gold == set(lightest)
    others = [weight for path, weight in found.items() if path not in problem.gold]
    assert max(found[path] for path in lightest) < min(others, default=math.inf)


CALL = '{"name": "submit_paths", "arguments": {"paths": [[0, 1], [0, 2, 1]]}}'


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (CALL, [(0, 1), (0, 2, 1)]),
        (f"Let me think {{about}} it.\n<tool_call>{CALL}</tool_call>", [(0, 1), (0, 2, 1)]),
        ('{"name": "submit_paths", "arguments": "{\\"paths\\": [[0, 1]]}"}', [(0, 1)]),
        ('```json\n{"paths": [[0, 1], ["a"], 3]}\n```', [(0, 1)]),
        ('{"name": "other", "arguments": {"paths": [[0, 1]]}}', None),
        ('{"name": "submit_paths", "arguments": [1]}', None),
        ("[[0, 1]]", None),
        ('{"a":' * 100_000, None),
    ],
)
def test_paths_are_parsed_from_a_tool_call(answer: str, found: list | None) -> None:
    assert paths.submitted(answer) == found


async def test_paths_score_by_their_share_and_more_of_them_do_not_help() -> None:
    task = paths.best_paths(1, 8, 3, 1)
    (problem,) = task.problems
    gold = sorted(problem.gold)
    for submitted, score in (
        (gold, 1),
        (gold[:2], 2 / 3),
        ([gold[0]] * 5, 1 / 3),
        ([(7, 0), (6, 0), (5, 0), *gold], 0),
    ):
        answer = json.dumps({"name": "submit_paths", "arguments": {"paths": submitted}})
        assert (await task.grade(problem, answer)).score == pytest.approx(score)
    with pytest.raises(ConfigError, match="ask for fewer"):
        paths.best_paths(1, 4, 50, 0)
