"""Settings from a file and from options: who counts more, and what is said of those that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.cli import app
from deploy.cluster.args import AppArgs
from deploy.commands import serve
from deploy.settings import load_config
from tandem.config import BUNDLED_MODELS
from tandem.errors import ConfigError

FILE = """
model: {dtype: bfloat16}
router: {port: 7000, http_port: 7001, policy: session}
speculation: {draft: ngram, num_assistant_tokens: 3}
"""


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The settings that `tandem serve` would start with, by its file and options."""
    file, started = tmp_path / "service.yaml", []
    monkeypatch.setattr(serve, "run", lambda config, *rest: started.append(config))

    def of(text: str, *options: str):
        file.write_text(text)
        app(["serve", "--config", str(file), *options], standalone_mode=False)
        return started[-1]

    return of


def test_a_named_option_counts_more_than_the_file_and_a_default_less(settings) -> None:
    config = settings(FILE)
    assert (config.router.port, config.router.http_port, config.router.policy) == (7000, 7001, "session")
    assert (config.model.dtype, config.speculation.draft) == ("bfloat16", "ngram")
    config = settings(FILE, "--port", "50051", "--policy", "least-loaded", "--dtype", "float32")
    assert (config.router.port, config.router.http_port, config.router.policy) == (
        50051,
        7001,
        "least-loaded",
    )
    assert config.model.dtype == "float32"
    assert (config.router.disaggregate, config.router.itl_limit_s) == ("always", 0)
    config = settings(FILE, "--disaggregate", "auto", "--itl-limit", "0.05")
    assert (config.router.disaggregate, config.router.itl_limit_s) == ("auto", 0.05)


def test_another_draft_keeps_the_files_other_settings_of_speculation(settings) -> None:
    config = settings(FILE, "--draft", str(BUNDLED_MODELS / "draft"))
    assert (config.speculation.draft, config.speculation.num_assistant_tokens) == ("model", 3)
    config = settings(
        f"speculation: {{draft: model, draft_path: {BUNDLED_MODELS / 'draft'}}}", "--draft", "ngram"
    )
    assert (config.speculation.draft, config.speculation.draft_path) == ("ngram", None)


def test_settings_of_speculation_leave_the_bundled_model_its_draft(settings) -> None:
    config = settings("speculation: {num_assistant_tokens: 3}")
    assert config.speculation.draft_path == BUNDLED_MODELS / "draft"
    assert config.speculation.num_assistant_tokens == 3


def test_a_log_level_that_is_none_is_refused_on_ray_too() -> None:
    with pytest.raises(ConfigError, match="log level"):
        AppArgs(log_level="loud").check(load_config(None))


def test_arguments_on_ray_count_more_than_its_file(tmp_path: Path) -> None:
    file = tmp_path / "service.yaml"
    file.write_text("router: {host: 127.0.0.2, port: 7000}")
    router = AppArgs(config=file, port=50051).config_tree().router
    assert (router.host, router.port) == ("127.0.0.2", 50051)


@pytest.mark.parametrize("text", ["", "# nothing yet", "router:\nmodel:\nsecurity:\nkvstore:\n"])
def test_what_is_empty_says_nothing(settings, text: str) -> None:
    assert settings(text) == settings("{}")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"router: 5", "router must be a mapping"),
        (b"model: tandem-8m", "model must be a mapping"),
        (b"security: {api_key_file: 5}", "security.api_key_file must be a path, not int"),
        (b"- router", "must hold a mapping of settings"),
        (b"router: [", "is not valid YAML"),
        (b"name: \xff\xfe", "is not UTF-8 text: invalid start byte at byte 6"),
    ],
)
def test_a_file_that_cannot_be_is_refused_by_what_is_wrong(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "service.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        load_config(file)
