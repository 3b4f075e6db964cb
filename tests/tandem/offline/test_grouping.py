"""Lines that begin alike come together; none is lost, and no more than a window is held."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

from hypothesis import given
from hypothesis import strategies as st

from tandem.offline.grouping import grouped
from tandem.offline.lines import BadLine, Entry

PROMPTS = st.one_of(
    st.text(max_size=8),
    st.lists(st.integers(0, 99), max_size=5),
    st.just([{"role": "user", "content": "x"}]),
)


def entry(line: int, prompt: object) -> Entry:
    return Entry(line, f"c{line}", "/v1/completions", {"prompt": prompt}, "")


@given(st.lists(PROMPTS | st.none(), max_size=60), st.integers(1, 20), st.integers(1, 100))
def test_every_line_comes_once_and_never_far_from_its_place(prompts, max_lines, max_bytes):
    lines = [
        (n, BadLine("BAD_LINE", "bad", f"c{n}") if prompt is None else entry(n, prompt))
        for n, prompt in enumerate(prompts)
    ]
    num_read = most_held = 0

    def read():
        nonlocal num_read
        for line in lines:
            num_read += 1
            yield line

    found = []
    for line in grouped(read(), max_lines, max_bytes):
        most_held = max(most_held, num_read - len(found))
        found.append(line)
    assert Counter(number for number, _ in found) == Counter(range(len(lines)))
    assert all(line is lines[line[0]] for line in found)
    assert most_held <= max_lines


def test_a_window_ends_where_its_prompts_have_many_bytes():
    numbers = iter(range(100))
    lines = grouped(((n, entry(n, "x" * 1000)) for n in numbers), 512, 5000)
    next(lines)
    assert next(numbers) == 5


def test_interleaved_beginnings_come_one_after_the_other():
    beginnings = ["You are a poet. ", "Translate: ", "Count "]
    lines = [(n, entry(n, beginnings[n % 3] + f"line {n}")) for n in range(90)]
    found = [line[1].body["prompt"].split("line")[0] for line in grouped(lines)]
    assert [(key, len(list(group))) for key, group in groupby(found)] == [
        (beginning, 30) for beginning in sorted(beginnings)
    ]
    chats = [
        [{"role": "system", "content": beginning}, {"role": "user", "content": str(n)}]
        for n, beginning in enumerate(beginnings * 3)
    ]
    together = grouped((n, entry(n, chat)) for n, chat in enumerate(chats))
    found = [line[1].body["prompt"][0]["content"] for line in together]
    assert len(list(groupby(found))) == 3
