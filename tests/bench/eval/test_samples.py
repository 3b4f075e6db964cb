"""Samples of texts: long enough, clipped, and none that loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.eval import samples
from bench.eval.decoding import PROMPT_TOKENS
from bench.eval.experiment import Settings
from bench.eval.models import pair_of
from bench.eval.texts import Source, docstrings, read_texts, sources
from bench.inflate import BUNDLED
from tandem.errors import ConfigError


@given(st.lists(st.integers(1, 300), min_size=1, max_size=20), st.integers(1, 30), st.integers(1, 200))
def test_samples_are_clipped_and_short_texts_left_out(lengths, count, length) -> None:
    ends = np.cumsum(lengths)
    source = Source("any", np.arange(ends[-1]), ends - lengths, ends)
    long_enough = [int(end - size) for end, size in zip(ends, lengths, strict=True) if size >= length]
    if not long_enough:
        with pytest.raises(ConfigError, match="no text of any has"):
            source.samples(count, length)
        return
    found = source.samples(count, length)
    assert len(found) == min(count, len(long_enough))
    assert {len(sample) for sample in found} == {length}
    assert {sample[0] for sample in found} <= set(long_enough)
    assert len(set(found)) == len(found)


def test_the_bundled_sources_are_held_out_text_of_three_kinds() -> None:
    found = list(sources(Settings(), BUNDLED.target))
    assert [source.name for source in found] == ["modules", "tests", "docstrings"]
    for source in found:
        assert len(source.samples(8, PROMPT_TOKENS)) == 8
        assert (source.starts < source.ends).all()


def test_docstrings_of_everything_that_has_one() -> None:
    from bench.bundled_pair.corpus import SourceFile

    text = '"""a"""\nclass C:\n    """b"""\n    def f(self):\n        """c"""\ndef g(): pass\n'
    assert docstrings([SourceFile("x.py", text)]) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("empty.txt", " \n", "holds no text"),
        ("bad.jsonl", '{"text": "a"}\nnot json', "record 2 is no JSON"),
        ("none.jsonl", '{"prompt": "a"}', "record 1 has no text"),
    ],
)
def test_unusable_texts_are_refused(tmp_path, name, content, why) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=why):
        read_texts(tmp_path / name)
    with pytest.raises(ConfigError, match="No such file"):
        read_texts(tmp_path / "missing")


def test_texts_are_lines_or_records(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "a.jsonl").write_text('{"text": "one\\ntwo"}\n')
    assert read_texts(tmp_path / "a.txt") == ["one", "two"]
    assert read_texts(tmp_path / "a.jsonl") == ["one\ntwo"]


def test_samples_that_loop_are_left_out(settings, monkeypatch) -> None:
    subject = pair_of(settings)
    source = next(sources(settings, subject.pair.target))
    monkeypatch.setattr(samples, "by_looping", lambda texts, prompt: (texts[::2], texts[1::2]))
    found = samples.first_samples(settings, subject, source)
    assert len(found.prompts) == 2
    assert found.looping_share == 0.5
    monkeypatch.setattr(samples, "by_looping", lambda texts, prompt: ([], texts))
    with pytest.raises(ConfigError, match="all 6 continuations of letters end in a loop"):
        samples.first_samples(settings, subject, source)
