"""Log-probabilities with the texts of their tokens, as both of OpenAI's forms need them."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tandem.output import OutputDelta

LOWEST = -9999.0  # for minus infinity, which JSON does not have


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token and its log-probability."""

    spelling: bytes
    logprob: float

    @property
    def text(self) -> str:
        return self.spelling.decode("utf-8", "replace")

    @property
    def name(self) -> str:
        """A text that tells tokens apart: one that is a part of a character is written in bytes."""
        try:
            return self.spelling.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.spelling)

    def to_json(self) -> dict[str, Any]:
        return {"token": self.text, "logprob": self.logprob, "bytes": list(self.spelling)}


@dataclass(frozen=True, slots=True)
class Logprobs:
    """One position of the output."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]
    text_offset: int  # characters of the choice before this token


class LogprobsReader:
    """Reads the deltas of one choice in order."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def read(self, delta: OutputDelta) -> list[Logprobs]:
        """One entry for each of the delta's tokens."""
        found = []
        for token_id, entry in zip(delta.token_ids, delta.logprobs, strict=True):
            chosen = self._named(token_id, entry.logprob)
            top = tuple(self._named(*alternative) for alternative in entry.top)
            found.append(Logprobs(chosen, top, self._offset))
            self._offset += len(self._decoder.decode(chosen.spelling))
        return found

    def _named(self, token_id: int, logprob: float) -> TokenLogprob:
        return TokenLogprob(self._bytes_of(token_id), max(logprob, LOWEST))
