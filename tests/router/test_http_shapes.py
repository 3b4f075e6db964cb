"""The forms of an answer: log-probabilities of characters in pieces, and token counts."""

from __future__ import annotations

import json
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from router.http.errors import error_response
from router.http.logprobs import LogprobsReader
from router.http.shapes import CHAT, COMPLETION, Part, usage_json
from tandem.errors import Cancelled, InvalidRequest, Overloaded, Unauthenticated
from tandem.output import OutputDelta, TokenLogprobs
from tandem.prefix_usage import PrefixHit
from tandem.request import Usage

EURO = "€".encode()


def read(*spellings: bytes, top=()):
    """The entries of tokens spelled so, each token's id its place."""
    vocabulary = [*spellings, b"a", b"b"]
    reader = LogprobsReader(vocabulary.__getitem__)
    entries = tuple(TokenLogprobs(-1.0, top) for _ in spellings)
    return reader.read(OutputDelta(tuple(range(len(spellings))), logprobs=entries))


@given(text=st.text(max_size=20), cuts=st.lists(st.integers(0, 60), max_size=6))
def test_offsets_count_the_characters_before_a_token_however_it_is_cut(text, cuts):
    data = text.encode()
    at = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = [data[start:end] for start, end in pairwise(at)]
    entries = read(*pieces)

    assert b"".join(entry.chosen.spelling for entry in entries) == data
    for start, entry in zip(at, entries, strict=False):
        whole_characters = data[:start].decode("utf-8", "ignore")
        assert entry.text_offset == len(whole_characters)


def test_parts_of_a_character_have_names_of_their_own():
    first, second = read(EURO[:1], EURO[1:])
    columns = COMPLETION.choice(Part(index=0, logprobs=[first, second]))["logprobs"]
    assert columns["tokens"] == [r"bytes:\xe2", r"bytes:\x82\xac"]
    rows = CHAT.choice(Part(index=0, logprobs=[first, second]))["logprobs"]["content"]
    assert b"".join(bytes(row["bytes"]) for row in rows) == EURO


def test_alternatives_hold_the_chosen_token_even_if_it_is_not_among_the_best():
    [entry] = read(b"x", top=((1, -0.5), (2, -0.75)))
    [best] = COMPLETION.choice(Part(index=0, logprobs=[entry]))["logprobs"]["top_logprobs"]
    assert best == {"a": -0.5, "b": -0.75, "x": -1.0}


def test_no_alternatives_were_asked_for():
    [entry] = read(b"x")
    assert COMPLETION.choice(Part(index=0, logprobs=[entry]))["logprobs"]["top_logprobs"] == [None]


def test_minus_infinity_is_a_number_that_json_has():
    reader = LogprobsReader(lambda token_id: b"x")
    [entry] = reader.read(OutputDelta((0,), logprobs=(TokenLogprobs(-float("inf")),)))
    assert json.loads(json.dumps(entry.chosen.to_json(), allow_nan=False))["logprob"] == -9999.0


def test_usage_counts_each_prompt_once_and_what_speculation_did():
    usages = [
        Usage(prompt=7, completion=4, hit=PrefixHit(2, 64, 0.0015), drafted=6, accepted=3),
        Usage(prompt=7, completion=5, hit=PrefixHit(2, 64, 0.0015), drafted=2, accepted=1),
        Usage(prompt=3, completion=1),
        Usage(prompt=3, completion=2),
    ]
    assert usage_json(usages, num_choices=2) == {
        "prompt_tokens": 10,
        "completion_tokens": 12,
        "total_tokens": 22,
        "prompt_tokens_details": {"cached_tokens": 2, "cached_bytes": 64, "saved_ms": 1.5},
        "completion_tokens_details": {"accepted_prediction_tokens": 4, "rejected_prediction_tokens": 4},
    }
    cold = usage_json(usages[2:], num_choices=2)
    assert "completion_tokens_details" not in cold
    assert cold["prompt_tokens_details"] == {"cached_tokens": 0}


def test_errors_tell_clients_whether_and_when_to_try_again():
    full = error_response(Overloaded("QUEUE_FULL", "server is full", retry_after_ms=1200))
    assert full.status_code == 429
    assert (full.headers["retry-after"], full.headers["retry-after-ms"]) == ("2", "1200")
    assert full.headers["x-should-retry"] == "true"
    gone = error_response(Cancelled())
    assert (gone.status_code, gone.headers["x-should-retry"]) == (499, "false")
    unknown = error_response(Unauthenticated("BAD_TOKEN", "token not accepted"))
    assert (unknown.status_code, unknown.headers["www-authenticate"]) == (401, "Bearer")


def test_an_error_names_its_parameter_and_survives_any_text():
    for name, written in (("top_p", "top_p"), ("\ud800", "?")):
        error = InvalidRequest("BAD_PARAM", f"`{name}` is not a parameter; `n` is")
        assert json.loads(error_response(error).body)["error"]["param"] == written
