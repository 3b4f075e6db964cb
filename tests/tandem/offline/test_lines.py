"""What lines mean, and what is said about those that mean nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.errors import ConfigError
from tandem.offline.census import take_census
from tandem.offline.lines import MAX_LINE_BYTES, BadLine, Entry, Line, LineParser, is_plain_text, read_entries

PARSER = LineParser(False, {"max_tokens": 9}, "model")
TEXT_PARSER = LineParser(True, {"max_tokens": 9}, "model")
BATCH = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}


def parse(values: object) -> Entry:
    return PARSER.parse(Line(3, json.dumps(values).encode()))


@pytest.mark.parametrize(
    ("values", "custom_id", "url", "body"),
    [
        (BATCH, "a", "completions", {"prompt": "x"}),
        ({"prompt": "x"}, "line-3", "completions", {"prompt": "x", "max_tokens": 9}),
        ({"prompt": "x", "max_tokens": 2}, "line-3", "completions", {"prompt": "x", "max_tokens": 2}),
        ({"custom_id": "b", "token_ids": [1]}, "b", "completions", {"prompt": [1], "max_tokens": 9}),
        ({"messages": []}, "line-3", "chat/completions", {"messages": [], "max_tokens": 9}),
    ],
)
def test_lines_of_each_kind(values, custom_id, url, body) -> None:
    entry = parse(values)
    assert (entry.line, entry.custom_id, entry.url, entry.body) == (3, custom_id, f"/v1/{url}", body)


@pytest.mark.parametrize(
    ("data", "column", "says"),
    [
        (b'{"prompt": ', 12, "not valid JSON: Expecting value at column 12"),
        (b'{"prompt": "\xc3\xa4", "x": }', 22, "not valid JSON"),
        (b'{"prompt": "\xff"}', 13, "not UTF-8 at column 13"),
        (b'{"prompt": "\\ud800"}', 1, "half of a surrogate pair"),
        (b'{"prompt": "x", "prompt": "y"}', 1, "a key occurs twice"),
        (b'{"temperature": NaN}', 1, "NaN is not a number"),
        (b'{"a": ' + b"9" * 5000 + b"}", 1, "not valid JSON"),
        (b"[" * 100_000, 1, "not valid JSON"),
        (b'["prompt"]', 1, "not a JSON object"),
        (b'{"text": "x"}', 1, "needs one of `prompt`"),
        (b'{"prompt": "x", "messages": []}', 1, "needs one of `prompt`"),
        (b'{"custom_id": 7, "prompt": "x"}', 1, "`custom_id` must be a string"),
        (json.dumps({**BATCH, "custom_id": None}).encode(), 1, "`custom_id` must be a string"),
        (json.dumps({**BATCH, "url": "/v1/embeddings"}).encode(), 1, "`url` must be one of"),
        (json.dumps({**BATCH, "method": "GET"}).encode(), 1, "`method` must be POST"),
        (json.dumps({**BATCH, "body": "x"}).encode(), 1, "`body` must be an object"),
        (None, 1, f"longer than {MAX_LINE_BYTES} bytes"),
    ],
)
def test_bad_lines_say_what_and_where(data, column, says) -> None:
    with pytest.raises(BadLine, match=says) as raised:
        PARSER.parse(Line(3, data))
    assert raised.value.code == "BAD_LINE"
    assert raised.value.column == column


@given(st.dictionaries(st.text(), st.integers() | st.text(), max_size=3), st.text(min_size=1))
def test_the_same_request_has_the_same_fingerprint_and_another_one_another(body, name) -> None:
    body = {"prompt": "x", **body}
    reordered = dict(reversed(body.items()))
    entry = parse({**BATCH, "custom_id": name, "body": body})
    assert parse({**BATCH, "body": reordered, "custom_id": name}).fingerprint == entry.fingerprint
    assert parse({**BATCH, "custom_id": name + "x", "body": body}).fingerprint != entry.fingerprint
    assert (
        parse({**BATCH, "custom_id": name, "body": {**body, "prompt": [1]}}).fingerprint != entry.fingerprint
    )
    other = LineParser(False, {}, "another model")
    data = json.dumps({**BATCH, "custom_id": name, "body": body}).encode()
    assert other.parse(Line(3, data)).fingerprint != entry.fingerprint


def test_only_newline_bytes_end_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffone\r\n\n  two \u2028 still\x0btwo\n\r\nthree".encode())
    assert is_plain_text(path)
    found = [(line, entry.body["prompt"]) for line, entry in read_entries(path, TEXT_PARSER)]
    assert found == [(1, "one"), (3, "  two \u2028 still\x0btwo"), (5, "three")]


def test_a_line_of_any_length_is_one_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    too_long = b'{"prompt": "' + b"x" * (2 * MAX_LINE_BYTES + 17) + b'"}\n'
    path.write_bytes(too_long + b'{"prompt": "x"}\n' + too_long[:-1])
    (first, bad), (second, entry), (third, bad_again) = read_entries(path, PARSER)
    assert (first, second, third) == (1, 2, 3)
    assert isinstance(bad, BadLine)
    assert isinstance(entry, Entry)
    assert isinstance(bad_again, BadLine)


def test_json_is_known_even_behind_a_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "requests"
    path.write_bytes(b'"custom_id": "a"}\n{"prompt": "x"}\n')
    assert not is_plain_text(path)
    path.write_bytes('{"prompt": "x"}\n'.encode("utf-16"))
    with pytest.raises(ConfigError, match="is UTF-16; convert it to UTF-8"):
        is_plain_text(path)
    with pytest.raises(ConfigError, match="cannot read"):
        is_plain_text(tmp_path / "none")


def test_an_input_cut_at_any_byte_has_one_name_for_every_line(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    lines = [json.dumps({**BATCH, "custom_id": name}).encode() + b"\n" for name in ("a", "ä", "c")]
    whole = b"".join(lines)
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        census = take_census(path, PARSER)
        num_whole = sum(len(b"".join(lines[: i + 1])) - 1 <= cut for i in range(3))
        num_cut = cut not in {0, *(len(b"".join(lines[: i + 1])) - d for i in range(3) for d in (0, 1))}
        assert (census.total, census.num_bad) == (num_whole + num_cut, num_cut), cut


def test_a_name_that_occurs_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    names = [*map(str, range(1000)), "417"]
    path.write_text("".join(json.dumps({**BATCH, "custom_id": name}) + "\n" for name in names))
    with pytest.raises(ConfigError, match=r"requests\.jsonl:1001: custom_id '417' is that of line 418 too"):
        take_census(path, PARSER)


def test_what_the_service_would_refuse_is_bad_too(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text('{"prompt": "x"}\n{"prompt": "no"}\n')

    def check(entry: Entry) -> None:
        if entry.body["prompt"] == "no":
            raise BadLine("BAD_PARAM", "never", entry.custom_id)

    census = take_census(path, PARSER, check)
    assert (census.total, census.num_bad, census.bad) == (2, 1, [(2, 1, "never")])
