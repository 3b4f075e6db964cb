"""Text to tokens and back, from a checkpoint's tokenizer.json. No torch, no transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tokenizers import Tokenizer as HfTokenizer
from tokenizers.decoders import DecodeStream

from tandem.errors import ConfigError, InvalidRequest
from tandem.token_spelling import Spelling

CONTEXT_TOKENS = 6  # prompt tokens that decide how the first output token is spaced
INCOMPLETE = "\ufffd"  # what a decoder writes for bytes that are not a character, or not yet


class Tokenizer:
    """Encodes prompts and decodes outputs of one model."""

    def __init__(self, tokenizer: HfTokenizer) -> None:
        self._tokenizer = tokenizer
        self._spelling = Spelling.of(tokenizer)
        self._added_ids = frozenset(tokenizer.get_added_tokens_decoder())

    @classmethod
    def from_dir(cls, path: Path) -> Self:
        """Load `path/tokenizer.json`; raises `ConfigError` if it is missing or unreadable."""
        file = path / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(
                f"no tokenizer.json in {path}; save the checkpoint with its fast tokenizer "
                "(AutoTokenizer.from_pretrained(...).save_pretrained(...))"
            )
        try:
            return cls(HfTokenizer.from_file(str(file)))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"{file} is not a usable tokenizer: {error}") from error

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids, with the special tokens the checkpoint's own tokenizer adds.

        Raises BAD_PARAM for half a surrogate pair, which JSON can bring and no encoding has bytes for.
        """
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        except TypeError as error:
            raise InvalidRequest("BAD_PARAM", "`prompt` must be valid Unicode text") from error

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for: UTF-8, or a part of a character's. A special token is its name.

        Raises BAD_PARAM for an id outside the vocabulary.
        """
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            raise InvalidRequest("BAD_PARAM", f"`tokens` must be in [0, {self.vocab_size})")
        return token.encode() if token_id in self._added_ids else self._spelling.bytes_of(token)

    def stream(self, context: Sequence[int] = ()) -> TokenStream:
        """An incremental decoder whose text continues after the `context` tokens."""
        return TokenStream(self._tokenizer, context)


class TokenStream:
    """Decodes one token at a time and never splits a code point: text waits until it is complete."""

    def __init__(self, tokenizer: HfTokenizer, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        ids = list(context)[-CONTEXT_TOKENS:]
        self._stream = DecodeStream(ids=ids, skip_special_tokens=True)
        before = str(tokenizer.decode(ids, skip_special_tokens=True))
        # A context that ends inside a character comes out again with the step that completes it.
        self._repeated = before if before.endswith(INCOMPLETE) else ""

    def step(self, token_id: int) -> str:
        """The text this token completes; empty while a character is incomplete."""
        try:
            text = self._stream.step(self._tokenizer, token_id) or ""
        except Exception:  # "Invalid prefix": bytes that are no UTF-8; start afresh behind them
            self._stream = DecodeStream(skip_special_tokens=True)
            text = self._stream.step(self._tokenizer, token_id) or ""
        if text and self._repeated:
            known = self._repeated if text.startswith(self._repeated) else self._repeated[:-1]
            text, self._repeated = text.removeprefix(known), ""
        return text
