"""`tandem bench serve` from the command line, against a real service."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.embedded import EmbeddedService
from tandem.config import SecurityConfig
from tests.command import tandem
from tests.e2e.harness import config

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

KEYS = {
    *("requests", "ok", "errors", "duration_s", "output_tokens_per_s", "goodput_rps", "client_bottleneck"),
    *("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms"),
}


def bench_serve(*arguments: object) -> dict:
    command = [sys.executable, "-m", "deploy.cli", "bench", "serve", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


async def test_the_same_requests_over_grpc_and_http_give_the_same_texts(tmp_path: Path) -> None:
    """A file of prompts, so that the requests are equal whatever the client knows of the model."""
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": f"story {n}", "max_tokens": 6 + n % 9, "ignore_eos": True} for n in range(40)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = ("--input", prompts, "--arrival", "constant", "--rate", 40, "--slo", "ttft=20s")
    keys = tmp_path / "keys"
    keys.write_text("a-token-of-this-test-and-no-other\n")
    keys.chmod(0o600)
    settings = replace(config(router={"http_port": 0}), security=SecurityConfig(api_key_file=keys))
    common += ("--api-key-file", keys)
    async with EmbeddedService(settings) as service:
        url, name = f"http://{service.http_address}", service.config.model.served_name
        both = ("--protocols", "--http-server", url)
        grpc = bench_serve("--server", service.address, "--out", tmp_path / "grpc", *both, *common)
        http = bench_serve("--server", url, "--model-name", name, "--out", tmp_path / "http", *common)
        searched = bench_serve(
            *("--server", service.address, "--out", tmp_path / "search", "--num-requests", 10, "--rate", 40),
            *("--api-key-file", keys),
            *("--max-goodput", "--trials", 1, "--slo", "ttft=0.001ms", "--output-tokens", 2, "--warm-up", 0),
        )
    assert grpc.keys() >= KEYS
    for summary in (grpc, http):
        assert (summary["ok"], summary["errors"], summary["goodput_rps"] > 0) == (40, 0, True)
    cost = grpc["protocol"]
    assert (cost["requests"], cost["same_texts"]) == (40, 1.0)
    assert {change["figure"] for change in cost["changes"]} == {"ttft_ms", "tpot_ms", "e2e_ms"}
    assert all(spent > 0 for spent in cost["client_cpu_ms"].values())
    server = json.loads((tmp_path / "grpc" / "serve.json").read_text())["server"]
    assert server["failed"] == 0  # it showed the token there, too
    assert max(reading["kv"]["decode-0"] for reading in server["readings"]) > 0
    texts = {}
    for protocol in ("grpc", "http"):
        records = json.loads((tmp_path / protocol / "serve.json").read_text())["records"]
        texts[protocol] = [(record["digest"], record["output_tokens"]) for record in records]
    assert texts["grpc"] == texts["http"]
    assert [tokens for _, tokens in texts["grpc"]] == [line["max_tokens"] for line in lines]
    assert searched["search"]["holding_rate"] is None  # nobody answers within a microsecond


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--arrival", "sometimes"], "arrival must be one of"),
        (["--arrival", "trace"], "--arrival trace needs a trace file"),
        (["--max-goodput"], "needs a limit, such as --slo"),
        (["--server", "http://127.0.0.1:9"], "give --model-name"),
        (["--input", "/no/such/file"], "cannot read /no/such/file"),
        (["--slo", "batch:speed=1s"], "limits are like interactive:ttft=500ms"),
        (["--request-class", "chat"], "classes are like"),
        (["--protocols"], "--protocols needs gRPC as --server"),
        (["--input-tokens", "many"], "lengths must be like"),
    ],
)
def test_what_cannot_work_is_one_clear_line(arguments: list[str], says: str) -> None:
    http = ["--server", "http://127.0.0.1:9", "--model-name", "x", "--warm-up", "0"]
    given = arguments if "--server" in arguments else [*http, *arguments]
    done = tandem("bench", "serve", *given)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
