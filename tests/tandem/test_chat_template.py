"""Chat templates: the same prompts that transformers makes, and nothing a template should not do."""

from __future__ import annotations

import json

import pytest
from transformers import PreTrainedTokenizerFast

from tandem.chat_template import ChatTemplate
from tandem.errors import ConfigError, InvalidRequest
from tests.checkpoints import byte_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{#- a comment #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if tools is not none %}{{- tools | tojson(indent=4) }}{%- endif %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
    {% elif message['role'] == 'assistant' %}
        {% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
    {% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}
{% endfor %}"""
QWEN_3 = """{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == "user" %}{%- set ns.last = loop.index0 %}{%- break %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{{- {"last": ns.last, "text": "<é>"} | tojson }}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
TEMPLATES = {"chatml": CHATML, "llama 3": LLAMA_3, "mistral": MISTRAL, "qwen 3": QWEN_3}

ASKS = [{"role": "user", "content": "What is 2 + 2? <b>&</b> ü"}]
TALKS = [*ASKS, {"role": "assistant", "content": " four\n"}, {"role": "user", "content": "and 3 + 3?"}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *ASKS]


def checkpoint(tmp_path, **settings):
    """A folder with a tokenizer and its settings, as `save_pretrained` writes them."""
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", **settings}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def refused(call, *words):
    with pytest.raises(InvalidRequest) as raised:
        call()
    assert raised.value.reason == "BAD_PARAM"
    assert all(word in raised.value.message for word in words), raised.value.message


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", [ASKS, TALKS, SYSTEM], ids=["one", "three", "system"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_prompts_are_those_of_transformers(tmp_path, name, messages, add_generation_prompt):
    path = checkpoint(tmp_path, chat_template=TEMPLATES[name], bos_token="<s>")
    theirs = PreTrainedTokenizerFast.from_pretrained(path)
    ours = ChatTemplate.from_dir(path)
    if name == "mistral" and messages is SYSTEM:
        refused(lambda: ours.render(messages), "roles must alternate")
        return
    variables = {"enable_thinking": False}
    assert ours.render(
        messages, add_generation_prompt=add_generation_prompt, variables=variables
    ) == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt, **variables
    )


def test_a_template_in_a_file_of_its_own_goes_first(tmp_path):
    path = checkpoint(tmp_path, chat_template="settings")
    (path / "chat_template.jinja").write_text("file: {{ messages[0].content }}\n")
    assert ChatTemplate.from_dir(path).render(ASKS) == f"file: {ASKS[0]['content']}"


def test_the_default_of_several_templates(tmp_path):
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    assert ChatTemplate.from_dir(checkpoint(tmp_path, chat_template=several)).render(ASKS) == "yes"


def test_special_tokens_saved_with_their_settings(tmp_path):
    bos = {"content": "<s>", "lstrip": False}
    path = checkpoint(tmp_path, chat_template="{{ bos_token }}|{{ eos_token }}", bos_token=bos)
    assert ChatTemplate.from_dir(path).render(ASKS) == "<s>|<|endoftext|>"


def test_a_model_without_a_template_has_none(tmp_path):
    assert ChatTemplate.from_dir(checkpoint(tmp_path)) is None


def test_a_template_that_is_none_is_said_at_start(tmp_path):
    with pytest.raises(ConfigError, match="chat template is not valid in line 2"):
        ChatTemplate.from_dir(checkpoint(tmp_path, chat_template="a\n{% for %}"))


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].nothing.at.all }}",
        "{% for i in range(10000000) %}x{% endfor %}",
        "{% include 'other' %}",
        "{{ 1 // 0 }}",
    ],
)
def test_whatever_goes_wrong_in_a_template_is_a_refusal_without_details(source):
    template = ChatTemplate(source, {})
    refused(lambda: template.render(list(ASKS)), "do not fit the model's chat template")


def test_variables_cannot_replace_what_the_service_sets():
    template = ChatTemplate(CHATML, {})
    refused(lambda: template.render(ASKS, variables={"messages": []}), "chat_template_kwargs", "messages")
