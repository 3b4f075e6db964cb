"""The README's code blocks run as they stand: bash blocks by bash, Python blocks by Python.

A block that calls a service finds one of the bundled model; only its ports are others, as 8000 may be taken.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", README, re.DOTALL)
GRPCURL = re.findall(r"^    (grpcurl .*)$", README, re.MULTILINE)
PORTS = {"127.0.0.1:50051": "address", "127.0.0.1:8000": "http_address"}


@pytest.fixture(scope="module")
def service() -> Iterator[dict[str, str]]:
    """What `tandem serve` says of itself."""
    command = [sys.executable, "-m", "deploy.cli", "serve", "--port", "0", "--http-port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
        process.terminate()


def test_readme_has_blocks_to_run() -> None:
    assert {kind for kind, _ in BLOCKS} == {"bash", "python"}
    assert GRPCURL


@pytest.mark.e2e
@pytest.mark.parametrize(("kind", "code"), BLOCKS)
def test_block_runs(kind: str, code: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if any(place in code for place in PORTS):
        facts = request.getfixturevalue("service")
        for place, name in PORTS.items():
            code = code.replace(place, facts[name])
    bin_folder = Path(sys.executable).parent
    command = ["bash", "-euo", "pipefail", "-c", code] if kind == "bash" else [sys.executable, "-c", code]
    environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
    assert '"error"' not in done.stdout


@pytest.mark.e2e
@pytest.mark.parametrize("command", GRPCURL)
def test_grpcurl_would_run(command: str, service: dict[str, str]) -> None:
    """grpcurl itself is rarely there. What it does is done: the method is looked up by the server's own
    reflection, and the JSON sent as its message."""
    words = shlex.split(command)
    service_name, method_name = words[-1].split("/")
    body = words[words.index("-d") + 1] if "-d" in words else "{}"
    with grpc.insecure_channel(service["address"]) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert service_name in database.get_services()
        found = DescriptorPool(database).FindServiceByName(service_name)
        method = found.methods_by_name[method_name]
        message = json_format.Parse(body, message_factory.GetMessageClass(method.input_type)())
        answer_class = message_factory.GetMessageClass(method.output_type)
        kind: Any = channel.unary_stream if method.server_streaming else channel.unary_unary
        call = kind(
            f"/{words[-1]}",
            request_serializer=lambda m: m.SerializeToString(),
            response_deserializer=answer_class.FromString,
        )
        answer = call(message, timeout=100)
        answers = list(answer) if method.server_streaming else [answer]
    assert all(found.ByteSize() for found in answers)
