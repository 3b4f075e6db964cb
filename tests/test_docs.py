"""What the documents name is there: commands and their options, settings, files, pages and their headings."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import typer
import yaml

from deploy.cli import app
from tandem.config import BUNDLED_MODELS, ClusterConfig

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "SECURITY.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
FOLDERS = "tandem|kvstore|prefill_worker|decode_worker|router|deploy|protos|bench|tests|docs"
COMMAND = re.compile(r"(?:^|[\s`/])tandem((?: [a-z][a-z0-9-]*)+)([^\n`#;]*)", re.MULTILINE)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(rf"`((?:{FOLDERS})/[\w./-]*\.(?:py|md|h|yaml|json|jinja|proto))(?:::(\w+))?")
SETTINGS = {
    field.name: get_type_hints(ClusterConfig)[field.name] for field in dataclasses.fields(ClusterConfig)
}
SETTING = re.compile(rf"`({'|'.join(SETTINGS)})\.(?!json)(\w+)(?:`|:|\.)")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def commands(text: str) -> Iterator[tuple[str, Any, set[str]]]:
    """Each command of the text by its words, what answers it, and the options it is given."""
    for match in COMMAND.finditer(re.sub(r"\\\n\s*", " ", text)):
        command: Any = typer.main.get_command(app)
        words = []
        for word in match[1].split():
            if word not in getattr(command, "commands", {}):
                break
            command = command.commands[word]
            words.append(word)
        if words:
            yield " ".join(words), command, set(OPTION.findall(match[2]))


def known_options(command: Any) -> set[str]:
    return {"--help", *(name for option in command.params for name in (*option.opts, *option.secondary_opts))}


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_options_are_those_of_the_command(page: Path) -> None:
    unknown = {
        (words, option)
        for words, command, options in commands(page.read_text())
        for option in options - known_options(command)
    }
    assert unknown == set()


def test_commands_are_found() -> None:
    found = list(
        commands("- `tandem bench serve --rate 8 \\\n    --no-such` and\n    tandem eval all --minutes 3\n")
    )
    assert [(words, options) for words, _, options in found] == [
        ("bench serve", {"--rate", "--no-such"}),
        ("eval all", {"--minutes"}),
    ]
    assert found[0][2] - known_options(found[0][1]) == {"--no-such"}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text()), target


@each_page
def test_files_and_tests_exist(page: Path) -> None:
    for name, member in FILE.findall(page.read_text()):
        assert (ROOT / name).is_file(), name
        assert not member or f"def {member}(" in (ROOT / name).read_text(), f"{name}::{member}"


@each_page
def test_settings_in_yaml_are_accepted(page: Path) -> None:
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL):
        values = yaml.safe_load(block)
        ClusterConfig.from_dict({"model": {"path": BUNDLED_MODELS / "target"}} | values)


@each_page
def test_settings_are_known(page: Path) -> None:
    for section, name in SETTING.findall(page.read_text()):
        assert name in {field.name for field in dataclasses.fields(SETTINGS[section])}, f"{section}.{name}"
