"""How a vocabulary writes bytes as characters. Text does not tell: a token may be half a character."""

from __future__ import annotations

import json
import re
from enum import Enum
from functools import cache

from tokenizers import Tokenizer as HfTokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "▁"


class Spelling(Enum):
    """The conventions of today's tokenizers, told by their decoder."""

    BYTE_LEVEL = "ByteLevel"  # GPT-2: each byte has a printable character of its own
    BYTE_FALLBACK = "ByteFallback"  # SentencePiece: ▁ is a space, <0xE2> is a byte
    METASPACE = "Metaspace"  # ▁ is a space
    PLAIN = ""  # as it stands

    @classmethod
    def of(cls, tokenizer: HfTokenizer) -> Spelling:
        if tokenizer.decoder is None:
            return cls.PLAIN
        # Its state is its part of tokenizer.json; the whole would take long with a large vocabulary.
        decoder = json.loads(tokenizer.decoder.__getstate__())
        kinds = {part["type"] for part in (decoder, *decoder.get("decoders", ()))}
        return next((spelling for spelling in cls if spelling.value in kinds), cls.PLAIN)

    def bytes_of(self, token: str) -> bytes:
        """The bytes that one token of the vocabulary stands for."""
        if self is Spelling.BYTE_LEVEL:
            alphabet = _byte_of_character()
            return bytes(alphabet[character] for character in token)
        if self is Spelling.BYTE_FALLBACK and (match := _BYTE.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return (token if self is Spelling.PLAIN else token.replace(_SPACE, " ")).encode()


@cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 stands for itself, the other bytes for characters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
