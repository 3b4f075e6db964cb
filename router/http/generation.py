"""What one call to a generating endpoint asks for: prompts, shape of the answer, stream or not."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from router.ask import Ask
from router.http.body import Fields, is_integers
from router.http.params import take_idle, take_sampling, take_session, take_speculation
from router.http.shapes import CHAT, COMPLETION, Shape
from router.intake import Intake
from tandem.chat_template import ChatTemplate
from tandem.sampling import SamplingParams, bad_param

MAX_PROMPTS = 64
COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens, for text completions only

Prompt = str | list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One call. Its answer has a choice for each prompt and each of `n` completions, in this order."""

    request_id: str
    asks: list[Ask]
    shape: Shape
    echoes: list[str]  # what each prompt's choices begin with
    num_choices: int  # per prompt
    has_logprobs: bool
    stream: bool
    include_usage: bool
    return_token_ids: bool

    def of_caller(self, tenant: str, session: str) -> Generation:
        """The same with whose it is; an empty session leaves the one that the body names."""
        asks = [replace(ask, tenant=tenant, session=session or ask.session) for ask in self.asks]
        return replace(self, asks=asks)


def parse_completion(values: Mapping[str, Any], intake: Intake) -> Generation:
    """A call to /v1/completions. Raises `BAD_PARAM`."""
    fields = Fields(values)
    prompts = _prompts(fields.take("prompt"))
    max_tokens = fields.integer("max_tokens")
    logprobs = fields.integer("logprobs")
    echo = fields.flag("echo")
    if echo and logprobs is not None:
        raise bad_param("`echo` with `logprobs` is not supported: prompts have no log-probabilities here")
    best_of = fields.integer("best_of")
    max_tokens = COMPLETION_TOKENS if max_tokens is None else max_tokens
    sampling = take_sampling(fields, max_tokens=max_tokens, logprobs=logprobs)
    if best_of not in (None, sampling.n):
        raise bad_param("`best_of` must equal `n`")
    echoes = [_text(prompt, intake) if echo else "" for prompt in prompts]
    return _generation(fields, COMPLETION, prompts, sampling, echoes)


def parse_chat(values: Mapping[str, Any], template: ChatTemplate | None) -> Generation:
    """A call to /v1/chat/completions. Raises `BAD_PARAM`."""
    fields = Fields(values)
    prompt = take_chat_prompt(fields, template)
    limits = {fields.integer("max_tokens"), fields.integer("max_completion_tokens")} - {None}
    if len(limits) > 1:
        raise bad_param("`max_tokens` and `max_completion_tokens` must agree")
    wants_logprobs = fields.flag("logprobs")
    top_logprobs = fields.integer("top_logprobs")
    if top_logprobs is not None and not wants_logprobs:
        raise bad_param("`top_logprobs` needs `logprobs`")
    logprobs = (top_logprobs or 0) if wants_logprobs else None
    sampling = take_sampling(fields, max_tokens=next(iter(limits), None), logprobs=logprobs)
    return _generation(fields, CHAT, [prompt], sampling, [""])


def take_chat_prompt(fields: Fields, template: ChatTemplate | None) -> str:
    """The prompt that the model's template makes of `messages`. Raises `BAD_PARAM`."""
    given = fields.take("messages")
    if not isinstance(given, list) or not given:
        raise bad_param("`messages` must be a list of at least one message")
    messages = [_message(message) for message in given]
    add_prompt = fields.take("add_generation_prompt")
    variables = fields.object("chat_template_kwargs")
    if add_prompt not in (None, True, False):
        raise bad_param("`add_generation_prompt` must be true or false")
    if template is None:
        raise bad_param("`messages` need a chat template, and this model has none; use /v1/completions")
    return template.render(messages, add_generation_prompt=add_prompt is not False, variables=variables)


def _message(given: object) -> dict[str, Any]:
    """Text parts are joined; everything but content is the template's affair."""
    if not isinstance(given, dict) or not isinstance(given.get("role"), str):
        raise bad_param("`messages` must be objects with a `role` and a `content`")
    content = given.get("content")
    if isinstance(content, list):
        content = "".join(_part(part) for part in content)
    if not isinstance(content, str | None):
        raise bad_param("`messages` must have a string or a list of text parts as `content`")
    return {**given, "content": content}


def _part(part: object) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise bad_param("`messages` may hold parts of type text only")
    return text


def _prompts(given: Any) -> list[Prompt]:
    """A string, a list of strings, a list of token ids, or a list of such lists."""
    found: list[Prompt] = [given] if isinstance(given, str) or (given and is_integers(given)) else given
    is_list = isinstance(found, list) and 0 < len(found) <= MAX_PROMPTS
    if is_list and (all(isinstance(p, str) for p in found) or all(is_integers(p) for p in found)):
        return found
    raise bad_param(
        f"`prompt` must be a string, a list of token ids, or a list of 1 to {MAX_PROMPTS} of either"
    )


def _text(prompt: Prompt, intake: Intake) -> str:
    return prompt if isinstance(prompt, str) else intake.detokenize(prompt)


def _generation(
    fields: Fields, shape: Shape, prompts: list[Prompt], sampling: SamplingParams, echoes: list[str]
) -> Generation:
    """What both endpoints have in common. Takes the rest of the fields."""
    take_idle(fields)
    request_id = fields.text("request_id") or f"{shape.id_prefix}{secrets.token_hex(12)}"
    common = Ask(
        prompt="",
        sampling=sampling,
        speculation=take_speculation(fields),
        model=fields.text("model"),
        priority=fields.integer("priority") or 0,
        timeout_s=fields.number("timeout"),
        session=take_session(fields),
        add_special_tokens=shape is COMPLETION,  # a chat template writes them itself
    )
    names = [request_id] if len(prompts) == 1 else [f"{request_id}-{i}" for i in range(len(prompts))]
    stream = fields.flag("stream")
    generation = Generation(
        request_id=request_id,
        asks=[
            replace(common, prompt=prompt, request_id=name)
            for prompt, name in zip(prompts, names, strict=True)
        ],
        shape=shape,
        echoes=echoes,
        num_choices=sampling.n,
        has_logprobs=sampling.logprobs is not None,
        stream=stream,
        include_usage=_include_usage(fields, stream),
        return_token_ids=fields.flag("return_token_ids"),
    )
    fields.finish()
    return generation


def _include_usage(fields: Fields, stream: bool) -> bool:
    given = fields.object("stream_options")
    if given and not stream:
        raise bad_param("`stream_options` needs `stream`")
    options = Fields(given)
    include_usage = options.flag("include_usage")
    options.flag("include_obfuscation")  # padding against eavesdroppers: there is none
    options.finish()
    return include_usage
