"""The container files, read as their engines would read them: no engine is needed for it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from jsonschema import Draft202012Validator

from deploy.cli import app
from deploy.settings import load_config

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = DEPLOY / "Dockerfile"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
PROMETHEUS = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())
BUILD = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"

TEXTS = {"type": "array", "items": {"type": "string"}}
LOOPBACK = {"type": "array", "items": {"type": "string", "pattern": r"^127\.0\.0\.1:\d+:\d+$"}}
DURATION = {"type": "string", "pattern": r"^\d+(ms|s|m)$"}


def closed(properties: dict, required: list[str]) -> dict:
    """An object with these fields and no others."""
    return {
        "type": "object",
        "required": required,
        "additionalProperties": False,
        "properties": properties,
    }


# The fields of the Compose specification that we use, with its types.
SERVICE = closed(
    {
        "image": {"type": "string"},
        "build": closed(
            {name: {"type": "string"} for name in ("context", "dockerfile", "target")},
            ["context", "dockerfile"],
        ),
        "command": TEXTS,
        "depends_on": {
            "type": "object",
            "additionalProperties": closed(
                {"condition": {"enum": ["service_started", "service_healthy"]}}, ["condition"]
            ),
        },
        "volumes": TEXTS,
        "ports": LOOPBACK,
        "healthcheck": closed(
            {"test": TEXTS, "interval": DURATION, "timeout": DURATION, "retries": {"type": "integer"}},
            ["test"],
        ),
        "stop_grace_period": DURATION,
    },
    [],
) | {"oneOf": [{"required": ["image"]}, {"required": ["build"]}]}
COMPOSE_SCHEMA = closed(
    {"name": {"type": "string"}, "services": {"type": "object", "additionalProperties": SERVICE}},
    ["services"],
)
# The same for Prometheus' configuration.
JOB = closed(
    {
        "job_name": {"type": "string"},
        "metrics_path": {"type": "string", "pattern": "^/"},
        "static_configs": {"type": "array", "items": closed({"targets": TEXTS}, ["targets"])},
    },
    ["job_name"],
)
PROMETHEUS_SCHEMA = closed(
    {
        "global": closed({"scrape_interval": DURATION}, []),
        "scrape_configs": {"type": "array", "items": JOB},
    },
    ["scrape_configs"],
)


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments, continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    pairs = (line.split(maxsplit=1) for line in joined.splitlines() if line.strip())
    return [(word, rest) for word, rest in pairs]


def copied() -> list[str]:
    return [source for word, rest in instructions() if word == "COPY" for source in rest.split()[:-1]]


def test_the_dockerfile_has_a_stage_for_each_variant():
    stages, known = {}, {"FROM", "RUN", "ENV", "WORKDIR", "COPY", "EXPOSE", "ENTRYPOINT", "CMD", "USER"}
    for word, rest in instructions():
        assert word in known, f"no such instruction: {word}"
        if word == "FROM":
            base, _, name = rest.split()
            assert ":" in base or base in stages
            stages[name] = []
        stages[name].append((word, rest))
    assert {"cpu", "cuda"} <= stages.keys()
    for variant in ("cpu", "cuda"):
        installs = [rest for word, rest in stages[variant] if word == "RUN"]
        assert any("-c constraints.txt" in rest and "ray" in rest for rest in installs)
        assert ("USER", "tandem") in stages[variant], "it must not run as root"


def test_what_the_dockerfile_copies_is_all_that_an_install_needs(tmp_path):
    """And the ignore file lets it through."""
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied()) == allowed
    source = tmp_path / "src"
    source.mkdir()
    for name in copied():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(tmp_path)],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("tandem_serve-*.whl"))) == 1


@pytest.mark.parametrize(
    ("document", "schema"),
    [(COMPOSE, COMPOSE_SCHEMA), (PROMETHEUS, PROMETHEUS_SCHEMA)],
    ids=["compose", "prometheus"],
)
def test_the_yaml_has_the_fields_its_reader_knows(document, schema):
    Draft202012Validator(schema).validate(document)


def test_compose_names_what_exists():
    services = COMPOSE["services"]
    for service in services.values():
        assert service.get("depends_on", {}).keys() <= services.keys()
        for waited in service.get("depends_on", {}):
            assert "healthcheck" in services[waited]
        for volume in service.get("volumes", []):
            assert (DEPLOY / volume.split(":")[0]).is_file()
    build = services["tandem"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).samefile(DOCKERFILE)
    assert any(word == "FROM" and rest.endswith(f" AS {build['target']}") for word, rest in instructions())


def test_the_command_in_compose_is_one_we_understand():
    name, *options = COMPOSE["services"]["tandem"]["command"]
    command = typer.main.get_command(app).commands[name]
    context = command.make_context(name, list(options))
    assert context.params["host"] == "0.0.0.0"
    assert context.params["insecure"]
    published = {port.rpartition(":")[2] for port in COMPOSE["services"]["tandem"]["ports"]}
    assert published == {str(context.params["port"]), str(context.params["http_port"])}


def test_the_settings_in_compose_point_at_its_redis():
    tree = load_config(DEPLOY / "configs" / "compose.yaml")
    assert tree.kvstore.url == "redis://redis:6379/0"
    assert "noeviction" in COMPOSE["services"]["redis"]["command"], "the store refuses another policy"


def test_prometheus_scrapes_the_port_of_the_openai_api():
    (job,) = PROMETHEUS["scrape_configs"]
    ports = [port.split(":")[2] for port in COMPOSE["services"]["tandem"]["ports"]]
    assert job["static_configs"][0]["targets"] == [f"tandem:{ports[1]}"]
