"""`tandem verify` passes what is sound and finds what is not, wherever on KV's way it went wrong."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest

import decode_worker.beginnings
import prefill_worker.sender
from deploy.commands import verify as command
from deploy.verify.arms import Arm, Findings
from deploy.verify.drift import Drift
from tandem.errors import ConfigError
from tests.checkpoints import tiny_llama
from tests.deploy.test_commands import tandem
from tests.e2e.harness import config, running

SIZE = command.Size(num_prompts=3, num_tokens=96, num_forced=8)


async def verify(cluster) -> dict[str, dict]:
    """The rows by name, against a running cluster, and the whole."""
    findings = await command.collect(cluster.config, cluster.router.internal_address, (), SIZE)
    document = command._document(cluster.config, findings)
    return {row["arm"]: row for row in document["arms"]} | {"all": document}


async def test_a_sound_service_passes_on_every_pair_of_workers():
    async with running(num_prefill=2, num_decode=3) as cluster:
        found = await verify(cluster)
    assert found["all"]["is_sound"]
    ways = {"here", "decode-0", "decode-1", "decode-2"}
    assert {name for name in found if "→" in name} == {
        "prefill-0 → here",
        "prefill-1 → here",
        "prefill-0 → decode-0",
        "prefill-1 → decode-1",
        "prefill-0 → decode-2",
    }
    for name, row in found.items():
        if name.split(" → ")[-1] in ways or name == "here, other chunks":
            assert (row["max_abs"], row["agreement"]) == (0, 1)
    assert found["blocks out of order"]["max_abs"] > 0
    assert found["a reversed prompt"]["mean_abs"] > 0.01
    assert found["all"]["flips"]["noticed"] == found["all"]["flips"]["tried"] >= 192


@contextmanager
def meddled(module, name, change):
    """The function's first argument, a cache, is changed by `change(cache, blocks)` around the call."""
    original = getattr(module, name)

    def call(cache, blocks, *args, **kwargs):
        return change(original, cache, blocks, *args, **kwargs)

    setattr(module, name, call)
    try:
        yield
    finally:
        setattr(module, name, original)


async def test_kv_that_leaves_wrong_is_found_everywhere():
    """One number of each block, by its last bit but a few: digests cannot know."""

    def spoil(export, cache, blocks, *args):
        data = bytearray(export(cache, blocks, *args))
        data[1] ^= 0x10
        return memoryview(data)

    async with running() as cluster:
        with meddled(prefill_worker.sender, "export_kv", spoil):
            found = await verify(cluster)
    assert not found["all"]["is_sound"]
    assert not found["prefill-0 → here"]["is_ok"]
    assert not found["prefill-0 → decode-0"]["is_ok"]
    assert found["here, other chunks"]["is_ok"]


async def test_kv_that_a_decode_worker_misplaces_is_found_there_only():
    def misplace(load, cache, blocks, *args):
        return load(cache, [*blocks[1:], *blocks[:1]], *args)

    async with running() as cluster:
        with meddled(decode_worker.beginnings, "import_kv", misplace):
            found = await verify(cluster)
    assert not found["all"]["is_sound"]
    assert found["prefill-0 → here"]["is_ok"]
    assert not found["prefill-0 → decode-0"]["is_ok"]


async def test_a_service_of_another_build_is_told_apart():
    async with running() as cluster:
        other = config(cache={"block_size": 32})
        with pytest.raises(ConfigError, match="runs another build of the model; give its --model"):
            await command.collect(other, cluster.router.internal_address, (), SIZE)


def test_codecs_are_measured_and_raw_is_exact():
    done = tandem(
        *("verify", "--model", str(tiny_llama()), "--json", "--codec", "int8", "--codec", "raw"),
        *("--prompts", "3", "--tokens", "96", "--forced", "8"),
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    drift = {row["codec"]: row for row in document["arms"] if row["arm"] == "prefill-0 → here"}
    assert drift["raw"]["max_abs"] == 0 < drift["int8"]["max_abs"] < 1
    assert document["is_sound"]


async def test_kv_of_unlike_dtypes_is_measured_and_need_not_be_exact(capsys):
    async with running(config(cache={"decode_dtype": "bfloat16"})) as cluster:
        findings = await command.collect(cluster.config, cluster.router.internal_address, (), SIZE)
        found = await verify(cluster)
    command._show(findings, command.Console())
    assert "rounded on its way, prefill → decode: float32 → bfloat16" in capsys.readouterr().out
    assert found["all"]["is_sound"]
    for way in ("prefill-0 → here", "prefill-0 → decode-0"):
        assert found[way]["dtypes"] == "float32 → bfloat16"
        assert 0 < found[way]["max_abs"] < found["a reversed prompt"]["max_abs"]
    assert found["here, other chunks"]["max_abs"] == 0


async def test_people_get_a_table(capsys):
    async with running() as cluster:
        findings = await command.collect(cluster.config, cluster.router.internal_address, (), SIZE)
    command._show(findings, command.Console())
    shown = capsys.readouterr().out
    for words in ("prefill-0 → decode-0", "bit-equal", "noticed", "KV arrives as it was computed"):
        assert words in shown


def of(max_abs: float, is_finite: bool = True) -> Drift:
    return Drift(num_places=1, num_values=1, max_abs=max_abs, sum_abs=max_abs, is_finite=is_finite)


@pytest.mark.parametrize(
    ("noise", "raw", "int8", "wrong", "flips", "is_sound"),
    [
        (0.0, 0.0, 0.1, 1.0, (8, 8), True),
        (1e-6, 1e-6, 0.1, 1.0, (8, 8), True),  # kernels that are not exact set the limit by themselves
        (0.0, 1e-9, 0.1, 1.0, (8, 8), False),
        (1e-6, 2e-6, 0.1, 1.0, (8, 8), False),
        (0.0, 0.0, 2.0, 1.0, (8, 8), False),  # no better than another prompt's KV
        (0.0, 0.0, 0.1, 0.0, (8, 8), False),  # what is wrong was not noticed
        (0.0, 0.0, 0.1, 1.0, (7, 8), False),
        (0.0, 0.0, 0.1, 1.0, (0, 0), False),
    ],
)
def test_what_passes(noise, raw, int8, wrong, flips, is_sound):
    findings = Findings(Arm("control", of(noise)), num_noticed=flips[0], num_flips=flips[1])
    findings.travelled = [Arm("a", of(raw), "raw"), Arm("b", of(int8), "int8")]
    findings.wrong = [Arm("wrong", of(wrong), "raw")]
    assert findings.is_sound == is_sound


def test_what_is_not_a_number_never_passes():
    findings = Findings(Arm("control", of(0.0)), num_noticed=1, num_flips=1)
    findings.travelled = [Arm("a", of(0.0, is_finite=False), "raw")]
    findings.wrong = [Arm("wrong", of(1.0), "raw")]
    assert not findings.is_sound
