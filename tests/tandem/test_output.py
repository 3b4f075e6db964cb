"""From tokens to text and to an end: stops in every position, and replay that changes nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.output import OutputDelta, OutputStream, TokenLogprobs
from tandem.request import FinishReason
from tandem.sampling import SamplingParams
from tandem.tokenizer import Tokenizer
from tests.checkpoints import EOS, byte_tokenizer

TOKENIZER = Tokenizer(byte_tokenizer())
LETTERS = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=4).map(tuple)


def make(prompt="", delivered=(), *, max_tokens=1000, **sampling) -> OutputStream:
    ids = TOKENIZER.encode(prompt)
    params = SamplingParams(max_tokens=max_tokens, **sampling)
    return OutputStream(TOKENIZER, params, max_tokens, {EOS}, [*ids, *delivered], len(ids))


def run(stream: OutputStream, ids) -> list[OutputDelta]:
    """Deltas until the end, or until the tokens run out."""
    deltas: list[OutputDelta] = []
    for token_id in ids:
        deltas.append(stream.append(token_id))
        if deltas[-1].finish is not None:
            break
    return deltas


def say(text: str, **options) -> list[OutputDelta]:
    return run(make(**options), TOKENIZER.encode(text))


def text_of(deltas) -> str:
    return "".join(delta.text for delta in deltas)


# --- text -----------------------------------------------------------------------------------------


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=30))
def test_deltas_add_up_to_what_the_tokenizer_decodes(text):
    ids = TOKENIZER.encode(text)
    deltas = run(make(), ids)
    assert text_of(deltas) == TOKENIZER.decode(ids) == text
    assert not any("\ufffd" in delta.text for delta in deltas)
    assert [delta.token_ids for delta in deltas] == [(token_id,) for token_id in ids]


def test_text_continues_after_the_prompt():
    assert text_of(run(make("prompt"), TOKENIZER.encode("é!"))) == "é!"


@pytest.mark.parametrize("length", [1, 2, 3])
def test_an_end_inside_a_character_leaves_it_out(length):
    deltas = say("a😀", max_tokens=1 + length)
    assert (text_of(deltas), deltas[-1].finish) == ("a", FinishReason.LENGTH)


def test_logprobs_travel_with_their_token():
    entry = TokenLogprobs(-0.5, ((1, -0.5), (2, -1.5)))
    assert make().append(70, entry).logprobs == (entry,)
    assert make().append(70).logprobs == ()


# --- ends -----------------------------------------------------------------------------------------


def test_length_ends_exactly_there():
    deltas = say("abcdef", max_tokens=3)
    assert text_of(deltas) == "abc"
    assert [delta.finish for delta in deltas] == [None, None, FinishReason.LENGTH]
    assert deltas[-1].matched_stop is None


def test_the_end_of_text_token_ends_without_text():
    delta = make().append(EOS)
    assert (delta.text, delta.finish, delta.matched_stop) == ("", FinishReason.STOP, EOS)


def test_an_ignored_end_of_text_token_is_just_a_token():
    stream = make(ignore_eos=True)
    assert stream.append(EOS).finish is None
    assert stream.append(TOKENIZER.encode("a")[0]).text == "a"


def test_a_stop_token_ends_without_its_text_even_if_end_of_text_is_ignored():
    (stop,) = TOKENIZER.encode("c")
    deltas = say("abcd", stop_token_ids=(stop,), ignore_eos=True)
    assert (text_of(deltas), deltas[-1].finish, deltas[-1].matched_stop) == ("ab", FinishReason.STOP, stop)


def test_a_stop_token_counts_more_than_length():
    (stop,) = TOKENIZER.encode("c")
    assert say("abc", stop_token_ids=(stop,), max_tokens=3)[-1].finish is FinishReason.STOP


def test_a_stop_string_counts_more_than_length():
    deltas = say("abc", stop=("bc",), max_tokens=3)
    assert (text_of(deltas), deltas[-1].finish) == ("a", FinishReason.STOP)


@pytest.mark.parametrize("end", ["token", "length"])
def test_held_text_that_was_no_stop_comes_with_the_end(end):
    stream = make(stop=("xyz",), max_tokens=3 if end == "length" else 9)
    deltas = run(stream, [*TOKENIZER.encode("axy"), EOS])
    assert text_of(deltas) == "axy"


# --- stop strings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "stops", "expected", "matched"),
    [
        ("hello STOP more", ("STOP",), "hello ", "STOP"),
        ("STOP", ("STOP",), "", "STOP"),
        ("aaab", ("aab",), "a", "aab"),
        ("xyxyz", ("xyz",), "xy", "xyz"),
        ("ab", ("b", "ab"), "", "ab"),  # the earlier beginning
        ("xabcy", ("abc", "b"), "xa", "b"),  # the one that is complete first
        ("né!", ("é",), "n", "é"),
        ("n😀!", ("😀!",), "n", "😀!"),
        ("a\n\nb", ("\n\n",), "a", "\n\n"),
        ("nothing", ("x", "nothingness"), "nothing", None),
    ],
)
def test_a_stop_string_over_several_tokens(text, stops, expected, matched):
    deltas = say(text, stop=stops)
    stream_end = text_of(deltas)
    if matched is None:
        assert deltas[-1].finish is None
        assert expected.startswith(stream_end)
    else:
        assert (stream_end, deltas[-1].finish) == (expected, FinishReason.STOP)
        assert deltas[-1].matched_stop == matched


class OneToken:
    """A token stream whose tokens are whole pieces of text."""

    def __init__(self, pieces) -> None:
        self._pieces = pieces

    def stream(self, context=()):
        return self

    def step(self, token_id: int) -> str:
        return self._pieces[token_id]


def pieces(*texts, max_tokens=1000, **sampling) -> list[OutputDelta]:
    params = SamplingParams(max_tokens=max_tokens, **sampling)
    return run(OutputStream(OneToken(texts), params, max_tokens, {EOS}, [0], 1), range(len(texts)))


@pytest.mark.parametrize(
    ("texts", "stops", "expected", "matched"),
    [
        (["xabcd"], ("bc", "ab"), "x", "ab"),  # earliest
        (["xabcd"], ("ab", "abc"), "x", "abc"),  # longest of those that begin there
        (["xabcd"], ("abc", "ab"), "x", "abc"),
        (["ends a", "b"], ("ab",), "ends ", "ab"),
        (["a stop in the middle"], ("stop",), "a ", "stop"),
        (["<|", "im", "_e", "nd|> more"], ("<|im_end|>",), "", "<|im_end|>"),
    ],
)
def test_stops_inside_and_across_large_tokens(texts, stops, expected, matched):
    deltas = pieces(*texts, stop=stops)
    assert text_of(deltas) == expected
    assert deltas[-1].matched_stop == matched


def test_text_is_held_back_only_while_it_may_become_a_stop():
    assert [delta.text for delta in say("abxabc!", stop=("abc",))] == ["", "", "abx", "", "", ""]
    assert [delta.text for delta in say("aab", stop=("ab",))] == ["", "a", ""]
    assert [delta.text for delta in say("ba", stop=("ab",))] == ["b", ""]


def test_nothing_is_held_back_without_stops():
    assert [delta.text for delta in say("abc")] == ["a", "b", "c"]


@given(LETTERS, STOPS)
def test_the_first_complete_stop_ends_and_nothing_of_it_leaks(text, stops):
    deltas = say(text, stop=stops)
    first_end = min((text.find(stop) + len(stop) for stop in stops if stop in text), default=None)
    if first_end is None:
        assert deltas == [] or deltas[-1].finish is None
        held = text[len(text_of(deltas)) :]
        assert text == text_of(deltas) + held
        assert held == "" or any(stop.startswith(held) for stop in stops)
    else:
        matching = [stop for stop in stops if text[:first_end].endswith(stop)]
        matched = max(matching, key=len)
        assert len(deltas) == first_end
        assert (deltas[-1].finish, deltas[-1].matched_stop) == (FinishReason.STOP, matched)
        assert text_of(deltas) == text[: first_end - len(matched)]


@pytest.mark.parametrize("min_tokens", range(7))
def test_stop_strings_do_not_count_before_min_tokens(min_tokens):
    deltas = say("abxxabyy", stop=("ab",), min_tokens=min_tokens)
    if min_tokens <= 2:
        assert text_of(deltas) == ""
    else:
        assert text_of(deltas) == "abxx"
    assert deltas[-1].finish is FinishReason.STOP


def test_a_stop_completed_by_the_first_token_that_counts():
    assert text_of(say("abc", stop=("bc",), min_tokens=3)) == "a"


# --- resuming -------------------------------------------------------------------------------------


@given(
    st.text("abé😀", max_size=16),
    st.lists(st.text("abé😀", min_size=1, max_size=3), max_size=3).map(tuple),
    st.integers(0, 12),
    st.integers(1, 40),
    st.booleans(),
)
def test_a_resumed_output_is_the_uninterrupted_one_at_every_cut(text, stops, min_tokens, max_tokens, ends):
    ids = TOKENIZER.encode(text) + [EOS] * ends
    options = {"stop": stops, "min_tokens": min(min_tokens, max_tokens), "max_tokens": max_tokens}
    whole = run(make("prompt é", **options), ids)
    last = len(whole) - (bool(whole) and whole[-1].finish is not None)
    for cut in range(last + 1):
        resumed = make("prompt é", ids[:cut], **options)
        assert resumed.num_tokens == cut
        assert run(resumed, ids[cut:]) == whole[cut:]


# --- on the wire ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "delta",
    [
        OutputDelta((5,), "text"),
        OutputDelta((5, 6), "é😀", (TokenLogprobs(-0.5, ((5, -0.5),)), TokenLogprobs(-0.25))),
        OutputDelta((0,), "", finish=FinishReason.LENGTH),
        OutputDelta((1,), "x", finish=FinishReason.STOP, matched_stop="STOP"),
        OutputDelta((1,), "x", finish=FinishReason.STOP, matched_stop=0),
        OutputDelta((), ""),
    ],
)
def test_a_delta_survives_the_wire(delta):
    assert OutputDelta.from_pb(type(delta.to_pb()).FromString(delta.to_pb().SerializeToString())) == delta
