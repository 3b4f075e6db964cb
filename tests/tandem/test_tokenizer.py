"""Text to tokens and back, whatever the text, and a stream that never splits a character."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, normalizers, processors

from tandem.config import BUNDLED_MODELS
from tandem.errors import ConfigError, InvalidRequest
from tandem.tokenizer import Tokenizer
from tests.checkpoints import EOS, VOCAB_SIZE, byte_tokenizer

NASTY = [
    "",
    " ",
    "\n\r\t",
    "a\0b",
    "\ufeff bom",
    "é e\u0301",
    "العربية עברית",
    "汉字かな交じり文",
    "👩‍👩‍👧‍👦🏳️‍🌈",
    "\U0010ffff\uffff",
    "z" * 5000,
    "\u202e right to left",
    "a\u200b\u2060b",
    "Z̸͑a̵l̶g̷o",
    "\x7f\x80\x9f",
]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.fixture(scope="module", params=["bytes", "bundled"])
def tokenizer(request) -> Tokenizer:
    return make(request.param)


def make(kind: str) -> Tokenizer:
    return Tokenizer(byte_tokenizer()) if kind == "bytes" else Tokenizer.from_dir(BUNDLED_MODELS / "target")


def sentencepiece() -> Tokenizer:
    """As Llama 2 writes tokens: ▁ is a space, bytes outside the vocabulary have names."""
    pieces = {"▁": 0, "▁a": 1, "a": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    tokenizer = HfTokenizer(models.BPE(vocab=pieces, merges=[("▁", "a")], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return Tokenizer(tokenizer)


BYTES, BUNDLED, LLAMA_2 = make("bytes"), make("bundled"), sentencepiece()


@pytest.mark.parametrize("text", NASTY)
def test_nasty_text_survives(tokenizer, text):
    ids = tokenizer.encode(text)
    assert all(0 <= token_id < tokenizer.vocab_size for token_id in ids)
    assert tokenizer.decode(ids) == text


@given(TEXT)
def test_the_bytes_of_the_tokens_are_the_text(text):
    for tokenizer in (BYTES, BUNDLED, LLAMA_2):
        spelled = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text)))
        assert spelled.decode().removeprefix(" " if tokenizer is LLAMA_2 else "") == text


def test_a_special_token_is_its_name():
    assert BYTES.token_bytes(EOS) == b"<|endoftext|>"


def test_a_token_that_does_not_exist_has_no_bytes():
    with pytest.raises(InvalidRequest, match="must be in"):
        BYTES.token_bytes(VOCAB_SIZE)


def test_special_tokens_can_be_left_to_the_text():
    begins = byte_tokenizer()
    begins.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", EOS)]
    )
    assert Tokenizer(begins).encode("a") == [EOS, *BYTES.encode("a")]
    assert Tokenizer(begins).encode("a", add_special_tokens=False) == BYTES.encode("a")
    assert Tokenizer(begins).encode("<|endoftext|>a", add_special_tokens=False) == [EOS, *BYTES.encode("a")]


@given(TEXT)
def test_any_text_survives(text):
    assert BYTES.decode(BYTES.encode(text)) == text
    assert len(BYTES.encode(text)) == len(text.encode())
    assert BUNDLED.decode(BUNDLED.encode(text)) == text


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\udc00\ud800"])
def test_half_a_surrogate_pair_is_the_callers_mistake(tokenizer, text):
    with pytest.raises(InvalidRequest) as caught:
        tokenizer.encode(text)
    assert caught.value.reason == "BAD_PARAM"


def test_special_tokens_are_not_text():
    assert BYTES.vocab_size == VOCAB_SIZE
    assert BYTES.decode([*BYTES.encode("ab"), EOS, *BYTES.encode("c")]) == "abc"
    assert BYTES.stream().step(EOS) == ""


# --- the stream -----------------------------------------------------------------------------------


def streamed(tokenizer: Tokenizer, ids, context=()) -> list[str]:
    stream = tokenizer.stream(context)
    return [stream.step(token_id) for token_id in ids]


@given(TEXT.filter(lambda text: "\ufffd" not in text))
def test_steps_add_up_to_the_text_and_never_split_a_character(text):
    for tokenizer in (BYTES, BUNDLED):
        parts = streamed(tokenizer, tokenizer.encode(text))
        assert "".join(parts) == text
        assert all("\ufffd" not in part for part in parts)


def test_a_character_comes_with_its_last_byte():
    assert streamed(BYTES, BYTES.encode("a😀b")) == ["a", "", "", "", "😀", "b"]


@given(TEXT.filter(lambda text: "\ufffd" not in text), st.data())
def test_the_output_continues_the_prompt_without_repeating_it(text, data):
    ids = BYTES.encode(text)
    cut = data.draw(st.integers(0, len(ids)))
    complete = text.encode()[:cut].decode(errors="ignore")
    assert "".join(streamed(BYTES, ids[cut:], ids[:cut])) == text[len(complete) :]


@given(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=60), st.integers(0, 20))
def test_any_tokens_at_all_are_decoded_without_an_error(ids, cut):
    parts = streamed(BYTES, ids[cut:], ids[:cut])
    assert "".join(parts).replace("\ufffd", "") in BYTES.decode(ids).replace("\ufffd", "")


def test_bytes_that_are_no_text_do_not_hold_up_what_follows():
    not_utf8 = [BYTES.encode("é")[1]] * 3  # continuation bytes with nothing to continue
    assert "".join(streamed(BYTES, [*not_utf8, *BYTES.encode("ok")])).endswith("ok")


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [None, b"", b"{", b"[]", b"{}", b"\xff\xfe\x00", json.dumps({"model": {"type": "Unknown"}}).encode()],
)
def test_a_missing_or_broken_file_is_a_config_error_that_names_it(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)


def test_a_folder_in_place_of_the_file_is_a_config_error(tmp_path):
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)


def test_a_saved_tokenizer_is_loaded(tmp_path):
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_dir(tmp_path).encode("hi") == BYTES.encode("hi")
