"""OpenAI's parameters, and vLLM's names for what OpenAI has not, as ours. Nothing is ignored unsaid."""

from __future__ import annotations

from typing import Any

from router.http.body import Fields, finite
from tandem.sampling import SamplingParams, bad_param
from tandem.speculation import SpeculationParams, parse_speculation

# Labels for the provider's own books: they change no answer, and are dropped.
LABELS = ("metadata", "safety_identifier")
# Features there are not. Their idle values, which some clients always send, are accepted.
IDLE: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "chat_template": (),
    "documents": ([],),
    "function_call": ("none",),
    "functions": ([],),
    "guided_json": (),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "web_search_options": (),
}


def take_session(fields: Fields) -> str:
    """Whose request it is, for a policy that keeps a session's requests together; it changes no answer."""
    given = [fields.take(name) for name in ("prompt_cache_key", "user")]
    return next((name for name in given if isinstance(name, str) and name), "")


def take_idle(fields: Fields) -> None:
    """Drop labels, and refuse features there are not unless they are idle."""
    for name in LABELS:
        fields.take(name)
    for name, idle in IDLE.items():
        value = fields.take(name)
        if value is not None and value not in idle:
            raise bad_param(f"`{name}` is not supported")


def take_sampling(fields: Fields, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
    """How tokens are chosen. As in OpenAI's API the temperature is 1 unless given. Raises `BAD_PARAM`."""
    top_k = fields.integer("top_k")
    given: dict[str, Any] = {
        "temperature": fields.number("temperature"),
        "top_p": fields.number("top_p"),
        "min_p": fields.number("min_p"),
        "repetition_penalty": fields.number("repetition_penalty"),
        "presence_penalty": fields.number("presence_penalty"),
        "frequency_penalty": fields.number("frequency_penalty"),
        "top_k": 0 if top_k == -1 else top_k,  # vLLM's word for all
        "min_tokens": fields.integer("min_tokens"),
        "seed": fields.integer("seed", bits=64),
        "n": fields.integer("n"),
        "max_tokens": max_tokens,
        "logprobs": logprobs,
    }
    return SamplingParams(
        **{"temperature": 1.0} | {name: value for name, value in given.items() if value is not None},
        ignore_eos=fields.flag("ignore_eos"),
        stop=fields.texts("stop"),
        stop_token_ids=fields.integers("stop_token_ids"),
        logit_bias=_logit_bias(fields.object("logit_bias")),
    )


def take_speculation(fields: Fields) -> SpeculationParams:
    """How drafts are accepted, where the server has a draft. Raises `BAD_PARAM`."""
    policy = parse_speculation(fields.text("speculation") or "exact").policy
    return SpeculationParams(
        policy=policy,
        num_assistant_tokens=fields.integer("num_assistant_tokens"),
        assistant_confidence_threshold=fields.number("assistant_confidence_threshold"),
    )


def _logit_bias(given: dict[str, Any]) -> dict[int, float]:
    """JSON's keys are strings."""
    for token_id, bias in given.items():
        is_id = token_id.isascii() and token_id.isdecimal() and len(token_id) < 10
        if not is_id or type(bias) not in (int, float):
            raise bad_param("`logit_bias` must map token ids to numbers")
    return {int(token_id): finite("logit_bias", bias) for token_id, bias in given.items()}
