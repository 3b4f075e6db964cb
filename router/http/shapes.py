"""The two forms an answer has in OpenAI's API, and what both have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from router.http.logprobs import Logprobs
from tandem.request import FinishReason, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A choice, or what a stream adds to it."""

    index: int
    text: str = ""
    token_ids: Sequence[int] | None = None  # where asked for
    logprobs: Sequence[Logprobs] | None = None  # where asked for
    finish: FinishReason | None = None
    matched_stop: str | int | None = None
    is_first: bool = False

    def common(self) -> dict[str, Any]:
        """Members both forms have. `stop_reason` and `token_ids` are vLLM's."""
        members: dict[str, Any] = {
            "index": self.index,
            "finish_reason": self.finish.value if self.finish else None,
        }
        if self.finish is not None:
            members["stop_reason"] = self.matched_stop
        if self.token_ids is not None:
            members["token_ids"] = list(self.token_ids)
        return members


class Shape(Protocol):
    """How one endpoint writes its answers."""

    id_prefix: str
    whole: str  # `object` of a complete answer
    chunk: str  # `object` of a part of a stream

    def choice(self, part: Part) -> dict[str, Any]: ...

    def delta(self, part: Part) -> dict[str, Any]: ...


class _Completion:
    """/v1/completions: text, whole or in pieces, is one form."""

    id_prefix = "cmpl-"
    whole = chunk = "text_completion"

    def choice(self, part: Part) -> dict[str, Any]:
        logprobs = None if part.logprobs is None else _columns(part.logprobs)
        return {**part.common(), "text": part.text, "logprobs": logprobs}

    delta = choice


class _Chat:
    """/v1/chat/completions: a message, or what is added to it."""

    id_prefix = "chatcmpl-"
    whole = "chat.completion"
    chunk = "chat.completion.chunk"

    def choice(self, part: Part) -> dict[str, Any]:
        message = {"role": "assistant", "content": part.text, "refusal": None}
        return {**part.common(), "message": message, "logprobs": _rows(part.logprobs)}

    def delta(self, part: Part) -> dict[str, Any]:
        added: dict[str, Any] = {"role": "assistant"} if part.is_first else {}
        if part.finish is None:
            added["content"] = part.text
        return {**part.common(), "delta": added, "logprobs": _rows(part.logprobs)}


COMPLETION: Shape = _Completion()
CHAT: Shape = _Chat()


def _columns(entries: Sequence[Logprobs]) -> dict[str, Any]:
    """One list per figure; alternatives by their text."""
    return {
        "tokens": [entry.chosen.name for entry in entries],
        "token_logprobs": [entry.chosen.logprob for entry in entries],
        "top_logprobs": [_alternatives(entry) for entry in entries],
        "text_offset": [entry.text_offset for entry in entries],
    }


def _alternatives(entry: Logprobs) -> dict[str, float] | None:
    """The best tokens and the chosen one, which need not be among them."""
    best = {token.name: token.logprob for token in reversed((*entry.top, entry.chosen))}
    return best if entry.top else None


def _rows(entries: Sequence[Logprobs] | None) -> dict[str, Any] | None:
    """One object per token."""
    if entries is None:
        return None
    content = [
        {**entry.chosen.to_json(), "top_logprobs": [top.to_json() for top in entry.top]} for entry in entries
    ]
    return {"content": content, "refusal": None}


def usage_json(usages: Sequence[Usage], num_choices: int) -> dict[str, Any]:
    """Of a whole answer; a prompt counts once, however many completions it has."""
    prompts = usages[::num_choices]
    prompt, completion = sum(u.prompt for u in prompts), sum(u.completion for u in usages)
    drafted, accepted = sum(u.drafted for u in usages), sum(u.accepted for u in usages)
    usage: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(u.cached for u in prompts)},
    }
    if any(u.cached for u in prompts):  # ours
        usage["prompt_tokens_details"] |= {
            "cached_bytes": sum(u.hit.num_bytes for u in prompts),
            "saved_ms": round(sum(1e3 * u.hit.saved_s for u in prompts), 3),
        }
    if drafted:
        usage["completion_tokens_details"] = {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted - accepted,
        }
    return usage
