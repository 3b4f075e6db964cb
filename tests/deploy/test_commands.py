"""The command line: what it prints, what it refuses, with which exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from deploy.commands.generate import read_prompts
from deploy.commands.plan import parse_bytes
from deploy.models import resolve_model
from deploy.settings import config_of, load_config
from tandem.config import BUNDLED_MODELS, SecurityConfig
from tandem.errors import ConfigError
from tandem.request import Mark
from tests.checkpoints import tiny_llama
from tests.command import tandem

GIB = 1 << 30
CONFIGS = Path(__file__).resolve().parent.parent / "data" / "configs"


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)


@pytest.mark.parametrize(
    ("model", "gib"),
    [("0.6b", 3.5), ("1.7b", 3.5), ("4b", 4.5), ("8b", 4.5), ("14b", 5.0), ("32b", 8.0)],
)
def test_plan_knows_the_kv_of_the_qwen3_family(model: str, gib: float) -> None:
    config = str(CONFIGS / f"qwen3-{model}.json")
    done = tandem(
        *("plan", "--model", config, "--dtype", "bfloat16", "--context", "32768", "--batch", "8", "--json")
    )
    facts = json.loads(done.stdout)
    assert facts["kv_bytes_per_request"] == gib * GIB
    assert facts["kv_bytes_at_batch"] == 8 * gib * GIB


def test_plan_counts_what_fits_into_a_memory() -> None:
    config = str(CONFIGS / "qwen3-8b.json")
    done = tandem(
        *("plan", "--model", config, "--dtype", "bfloat16"),
        *("--context", "4096", "--memory", "24GiB", "--json"),
    )
    facts = json.loads(done.stdout)
    budget = 24 * GIB - facts["weights_bytes"]
    assert facts["num_blocks"] == budget // facts["block_bytes"]
    assert facts["max_concurrent_requests"] == facts["num_blocks"] // (4096 // 16)
    assert facts["max_tokens_at_batch"] == min(facts["num_blocks"] * 16, facts["max_context"])


def test_plan_for_people_names_every_figure() -> None:
    done = tandem("plan", "--memory", "1GiB")
    assert done.returncode == 0
    for word in ("weights", "KV per token", "KV per request", "fit at once", "longest sequence"):
        assert word in done.stdout


def test_a_plan_says_what_does_not_fit() -> None:
    assert "does not fit: the weights alone" in tandem("plan", "--memory", "1MiB").stdout
    assert "does not fit: one request of 2,048 tokens" in tandem("plan", "--memory", "32MiB").stdout
    assert "does not fit" not in tandem("plan", "--memory", "64MiB").stdout


def test_grpcs_own_chatter_is_off_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)
    for wanted in ("ERROR", "DEBUG"):
        tandem("--version")
        assert os.environ["GRPC_VERBOSITY"] == wanted
        monkeypatch.setenv("GRPC_VERBOSITY", "DEBUG")


def test_it_says_its_version() -> None:
    assert tandem("--version").stdout.strip() == version("tandem-serve")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "--model", "/no/such/folder"], "no folder"),
        (["plan", "--memory", "many"], "cannot read 'many' as a size"),
        (["plan", "--dtype", "int3"], "dtype must be one of"),
        (["generate"], "no prompt"),
        (["generate", "x", "--temperature", "3"], "`temperature` must be a finite number in [0, 2]"),
        (["generate", "x", "--speculation", "maybe"], "`speculation` must be one of"),
        (["generate", "x", "--server", "127.0.0.1:1"], "is the server running?"),
        (["audit", "127.0.0.1:1"], "no answer from 127.0.0.1:1 (UNAVAILABLE); is the server running?"),
        (["verify", "127.0.0.1:1"], "no answer from 127.0.0.1:1 (UNAVAILABLE); is the server running?"),
        (["verify", "--tokens", "9"], "prompts need 64 tokens at least"),
        (["verify", "--tokens", "4096"], "4128 tokens are more than the model's 2048"),
        (["verify", "--codec", "zip"], "unknown codec zip; known: raw, fp16"),
        (["serve", "--host", "0.0.0.0"], "refusing to listen on 0.0.0.0"),
        (["serve", "--config", "/no/such.yaml"], "cannot read /no/such.yaml"),
        (["serve", "--tls-cert", "/c"], "a TLS certificate needs its key"),
        (["serve", "--api-key-file", "/no/such", "--try"], "--try calls without token and TLS"),
        (["serve", "--api-key-file", "/no/such", "--port", "0"], "cannot read /no/such"),
        (["serve", "--log-level", "loud"], "log level must be one of DEBUG, INFO"),
        (["serve", "--http-port", "70000"], "router port must be in [0, 65535]"),
        (["generate", "x", "--tls-ca", "/ca"], "are for calls to --server"),
        (["generate", "x", "--server", "http://127.0.0.1:8000"], "--server is host:port"),
        (["audit", "127.0.0.1"], "SERVER is host:port"),
        (["generate", "x", "--server", "h:1", "--tls-key", "/k"], "a key its certificate"),
    ],
)
def test_what_cannot_work_is_one_clear_line(arguments: list[str], says: str) -> None:
    done = tandem(*arguments)
    assert done.returncode in (1, 2)
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("80GiB", 80 * GIB), ("512MB", 512 * 10**6), ("8e9", 8 * 10**9), ("1.5 gib", 3 * GIB // 2), ("", None)],
)
def test_sizes(text: str, num_bytes: int | None) -> None:
    assert parse_bytes(text) == num_bytes


def test_prompt_files(tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_bytes("\ufeffone\r\n\ntwo \u2028 still two\n".encode())
    assert read_prompts(["zero"], lines) == ["zero", "one", "two \u2028 still two"]
    records = tmp_path / "records.jsonl"
    records.write_text('{"prompt": "one"}\n\n{"token_ids": [1, 2]}\n')
    assert read_prompts([], records) == ["one", [1, 2]]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"prompt": "a"}\n{"prompt": \n', ":2: not valid JSON"),
        (b'{"prompt": "a"}\n{"text": "b"}\n', ':2: needs "prompt"'),
        (b'{"token_ids": [1, -2]}\n', ':1: needs "prompt"'),
        (b'{"token_ids": [true]}\n', ':1: needs "prompt"'),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_bad_prompt_files_name_the_line(tmp_path: Path, content: bytes, says: str) -> None:
    file = tmp_path / "prompts"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=says.replace("[", r"\[")):
        read_prompts([], file)


def test_settings_come_from_file_and_options(tmp_path: Path) -> None:
    file = tmp_path / "service.yaml"
    file.write_text("cache: {block_size: 32}\nrouter: {port: 7000}\n")
    config = load_config(file, port=1)
    assert (config.cache.block_size, config.router.port) == (32, 7000)
    assert config.model.path == BUNDLED_MODELS / "target"
    assert config.speculation.draft_path == BUNDLED_MODELS / "draft"
    assert load_config(None, draft="none").speculation.draft == "none"
    assert load_config(None, model=str(tiny_llama())).speculation.draft == "none"
    file.write_text("cache: {blocksize: 32}\n")
    with pytest.raises(ConfigError, match=r"unknown setting cache\.blocksize"):
        load_config(file)


def test_models_are_found_by_folder() -> None:
    assert resolve_model(None) == BUNDLED_MODELS / "target"
    assert resolve_model(str(tiny_llama())) == tiny_llama()
    with pytest.raises(ConfigError, match="no folder"):
        resolve_model("./missing")


@pytest.mark.e2e
def test_generate_answers_a_file_in_input_order(tmp_path: Path) -> None:
    prompts = ["first", "second", "third"]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    done = process(
        *("generate", "--prompt-file", str(file), "--model", str(tiny_llama())),
        *("--max-tokens", "5", "--ignore-eos", "--json", "--draft", "ngram", "--logprobs", "1"),
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["usage"]["prompt"] for record in records] == [len(prompt) for prompt in prompts]
    for record in records:
        assert len(record["token_ids"]) == len(record["logprobs"]) == 5
        assert record["finish_reason"] == "length"
        parts = [record["timings"][mark.value] for mark in Mark]
        assert sum(parts) == pytest.approx(record["timings"]["total_ms"], abs=0.01)


@pytest.mark.e2e
def test_demo_answers_eight_prompts_and_leaves_nothing_behind() -> None:
    done = process("demo", "--json")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(records) == 8
    assert all(record["text"].strip() for record in records)
    assert "units still owned in any pool: 0" in done.stderr


def test_a_plan_counts_the_draft() -> None:
    """A separate draft takes KV in every block, a self-draft only weights; both leave less room."""
    facts = {}
    for name, options in (
        ("alone", []),
        ("own", ["--draft", "self", "--draft-quantization", "nf4"]),
        ("separate", ["--draft", str(BUNDLED_MODELS / "draft")]),
    ):
        facts[name] = json.loads(tandem("plan", "--memory", "100MiB", "--json", *options).stdout)
    alone, own, separate = facts["alone"], facts["own"], facts["separate"]
    assert alone["draft_weights_bytes"] == alone["draft_kv_bytes_per_token"] == 0
    assert own["draft_kv_bytes_per_token"] == 0
    assert 0.15 < own["draft_weights_bytes"] / own["weights_bytes"] < 0.3  # 4 of 32 bits, and the embedding
    assert separate["draft_kv_bytes_per_token"] == 2 * 2 * 2 * 32 * 4  # layers, K and V, heads, dim, bytes
    assert alone["num_blocks"] > own["num_blocks"]
    assert separate["block_bytes"] > alone["block_bytes"]
    for plan in facts.values():
        budget = 100 * 2**20 - plan["weights_bytes"] - plan["draft_weights_bytes"]
        assert plan["num_blocks"] == budget // plan["block_bytes"]


def test_settings_name_the_precision_of_both_sides() -> None:
    config = load_config(None, draft="self", quantization="int8", draft_quantization="nf4")
    assert config.model.quantization == "int8"
    assert (config.speculation.draft, config.speculation.draft_quantization) == ("self", "nf4")


def test_the_options_of_a_service_are_its_settings(tmp_path: Path) -> None:
    options = {
        **{"host": "0.0.0.0", "port": 1, "http_port": 2, "model": None, "draft": "none"},
        **{"api_key_file": tmp_path / "k", "tls_cert": tmp_path / "c", "tls_key": tmp_path / "p"},
        **{"tls_client_ca": None, "insecure": False, "prefill": 2, "json_output": True},
    }
    config = config_of(None, options)
    assert (config.router.host, config.router.port, config.router.http_port) == ("0.0.0.0", 1, 2)
    assert config.security == SecurityConfig(
        api_key_file=tmp_path / "k", tls_cert=tmp_path / "c", tls_key=tmp_path / "p"
    )
    file = tmp_path / "settings.yaml"
    file.write_text("security: {insecure: true}\nrouter: {http_port: null}\n")
    from_file = config_of(file, {"http_port": 8000, "insecure": False})
    assert (from_file.security.insecure, from_file.router.http_port) == (True, None)


def test_help_is_shown_without_what_only_commands_need() -> None:
    """They cost more to import than all the rest: what a command needs is imported when it runs."""
    code = """
import sys
from deploy.cli import app
app(["--help"], standalone_mode=False)
heavy = {"torch", "transformers", "grpc", "google.protobuf", "asyncio", "numpy", "ray", "yaml"}
print(sorted(heavy & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == "[]\n"
    assert "Serve a large language model" in done.stdout
