"""Chat messages to one prompt, by the template in the checkpoint's folder. Never by a caller's.

A template is a Jinja program, so it runs in Jinja's sandbox, and sees what transformers documents for
templates: the messages, the special tokens, `raise_exception`, `strftime_now` and a plain `tojson`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tandem.errors import ConfigError
from tandem.sampling import bad_param

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
RESERVED = {*SPECIAL_TOKENS, "messages", "tools", "documents", "add_generation_prompt"}
MAX_COMPLAINT = 200  # characters of what a template says about messages it refuses

Message = Mapping[str, Any]


class ChatTemplate:
    """The compiled template of one model."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises `ConfigError` if `source` is not a template."""
        try:
            self._template = _environment().from_string(source)
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"the chat template is not valid in line {error.lineno}: {error.message}"
            ) from error
        self._special_tokens = dict(special_tokens)

    @classmethod
    def from_dir(cls, path: Path) -> Self | None:
        """The template of the checkpoint at `path`, or None if it has none."""
        settings = _read_json(path / "tokenizer_config.json")
        source = _source(path, settings)
        if source is None:
            return None
        named = {**_read_json(path / "special_tokens_map.json"), **settings}
        tokens = {name: _content(named[name]) for name in SPECIAL_TOKENS if named.get(name)}
        return cls(source, tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt, special tokens written out. Raises `BAD_PARAM` if the template refuses the messages.

        `variables` are switches of the template's own, such as Qwen's `enable_thinking`.
        """
        if taken := RESERVED & set(variables or {}):
            raise bad_param(f"`chat_template_kwargs` may not set {', '.join(sorted(taken))}")
        try:
            return self._template.render(
                **self._special_tokens,
                **(variables or {}),
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except _Refusal as error:
            raise bad_param(f"`messages` are refused by the chat template: {error}") from error
        except Exception as error:  # a template can raise anything Python can
            raise bad_param("`messages` do not fit the model's chat template") from error


class _Refusal(TemplateError):
    """What a template raises by its own will."""


class _GenerationBlock(Extension):
    """`{% generation %}` marks what an assistant wrote, for training; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json  # Jinja's own escapes what HTML needs
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _refuse(complaint: object) -> None:
    raise _Refusal(str(complaint)[:MAX_COMPLAINT])


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _source(path: Path, settings: Mapping[str, Any]) -> str | None:
    """The template's text: a file of its own goes before the tokenizer's settings."""
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = settings.get("chat_template") or _read_json(path / "chat_template.json").get("chat_template")
    if isinstance(found, list):  # several by name
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return found if isinstance(found, str) else None


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object, or nothing where there is no such file."""
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from error
    return values if isinstance(values, dict) else {}


def _content(token: str | dict[str, Any]) -> str:
    """The text of a special token, which older tokenizers save with its settings."""
    return str(token["content"]) if isinstance(token, dict) else str(token)
