"""What an operator does by hand: a cluster with a token, `serve deploy` of our config, and plain refusals."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tandem.client import TandemClient
from tandem.sampling import SamplingParams
from tests.checkpoints import tiny_llama
from tests.e2e.ray_rig import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(300)]

BIN = Path(sys.executable).parent
ONE_NODE = Path(__file__).resolve().parents[2] / "deploy" / "configs" / "one_node.yaml"


@contextmanager
def ray_head(port: int, dashboard_port: int, environment: dict[str, str]):
    """A cluster of this machine; its processes are a group that ends with the block."""
    options = ("--port", str(port), "--dashboard-port", str(dashboard_port), "--num-cpus", "2")
    head = subprocess.Popen(
        [BIN / "ray", "start", "--head", "--block", "--disable-usage-stats", *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        assert head.stdout is not None
        assert any("Ray runtime started" in line for line in head.stdout)
        yield
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        head.communicate(timeout=60)


def serve_deploy(config: Path, address: str, environment: dict[str, str]) -> None:
    command = [BIN / "serve", "deploy", config, "--address", address]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr


async def test_the_one_node_config_is_served_by_a_cluster_with_a_token(tmp_path):
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    environment.pop("RAY_ADDRESS", None)
    public, (gcs, dashboard) = free_port(), (free_port(), free_port())
    document = yaml.safe_load(ONE_NODE.read_text())
    document["applications"][0]["args"] |= {
        "model": str(tiny_llama()),
        "draft": "none",
        "port": public,
        "internal_port": public + 1,
        "http_port": 0,
    }
    config = tmp_path / "serve.yaml"
    config.write_text(yaml.safe_dump(document))
    with ray_head(gcs, dashboard, environment):
        serve_deploy(config, f"http://127.0.0.1:{dashboard}", environment)
        async with TandemClient(f"127.0.0.1:{public}") as client:
            await client.wait_until_serving(120)
            response = await client.generate("a story", SamplingParams(max_tokens=8, ignore_eos=True))
    assert len(response.completions[0].token_ids) == 8


def test_what_only_a_replica_can_find_out_ends_the_command_with_one_clear_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [BIN / "tandem", "serve", "--ray", "--port", str(port), "--http-port", "0"],
            env={**os.environ, "RAY_ADDRESS": "local"},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
    assert done.returncode == 2, done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert f"cannot listen on 127.0.0.1:{port}" in said
    assert "Traceback" not in done.stderr
