"""What /metrics says of a service, against what was just done to it."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from pathlib import Path

import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.harness import (
    BLOCK_BYTES,
    PATIENCE_S,
    ask,
    config,
    failure,
    gated_reads,
    generate,
    open_stream,
    quiesce,
    running,
    until,
)
from tests.web import get, post

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROOT = Path(__file__).resolve().parents[2]
PREFILL, DECODE = ("prefill", "prefill-0"), ("decode", "decode-0")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster():
    async with running(config(router={"http_port": 0, "max_queue": 4})) as started:
        yield started


async def scrape(cluster) -> Counter:
    """(name, label values…) → value, as Prometheus reads it."""
    reply = await get(cluster.http_address, "/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = list(text_string_to_metric_families(reply.body.decode()))
    assert all(family.name.startswith("tandem_") and ":" not in family.name for family in families)
    assert all(family.documentation for family in families)
    return Counter(
        {
            (sample.name, *sample.labels.values()): sample.value
            for family in families
            for sample in family.samples
        }
    )


async def test_what_was_done_is_counted(cluster):
    before = await scrape(cluster)
    answer = await generate(cluster, ask("a story", max_tokens=9, ignore_eos=True, n=2))
    refused = await failure(generate(cluster, ask("x" * 600, max_tokens=4)))
    await quiesce(cluster)
    done = await scrape(cluster)
    assert 0 <= done["tandem_kv_sweep_age_s",] < 5
    done.subtract(before)

    assert refused.reason == "PROMPT_TOO_LONG"
    assert done["tandem_admission_decisions_total", "admitted", ""] == 2
    assert done["tandem_admission_decisions_total", "refused", "PROMPT_TOO_LONG"] == 1
    assert done["tandem_requests_total", "length"] == 2
    assert done["tandem_prompt_tokens_total",] == 14
    assert done["tandem_output_tokens_total",] == 18
    assert done["tandem_time_to_first_token_seconds_count",] == 2
    assert done["tandem_e2e_request_latency_seconds_count",] == 2
    deliveries = done["tandem_token_deliveries_total",]
    assert done["tandem_inter_token_latency_seconds_count",] == deliveries - 2
    assert done["tandem_kv_operations_total", "sealed"] == 2

    total_s = sum(completion.finished.timings.total_ms for completion in answer.completions) / 1e3
    assert done["tandem_e2e_request_latency_seconds_sum",] == pytest.approx(total_s, rel=1e-3)
    staged_s = sum(value for (name, *_), value in done.items() if name == "tandem_request_stage_seconds_sum")
    assert staged_s == pytest.approx(total_s, rel=1e-3)


async def test_memory_and_queue_are_read_when_somebody_scrapes(cluster):
    idle = await scrape(cluster)
    assert idle["tandem_kv_capacity_bytes", *DECODE] == 256 * BLOCK_BYTES
    assert idle["tandem_kv_capacity_bytes", *PREFILL] == 128 * BLOCK_BYTES
    assert (idle["tandem_workers", "decode", "ready"], idle["tandem_workers", "prefill", "ready"]) == (1, 1)

    with gated_reads(cluster.decodes[0], before=True) as gate:
        call = open_stream(cluster, ask("x", max_tokens=500, n=8))  # 32 blocks each: the pool of 256
        waiting = open_stream(cluster, ask("x", max_tokens=500, n=3))
        await until(lambda: gate.num_arrived == 8)
        await until(lambda: cluster.router.dispatcher.planner.snapshot().length == 3)
        busy = await scrape(cluster)
        assert (busy["tandem_requests_running",], busy["tandem_requests_waiting",]) == (8, 3)
        assert 0 < busy["tandem_queue_oldest_wait_seconds",] < PATIENCE_S
        assert busy["tandem_kv_reserved_bytes", *DECODE] == 256 * BLOCK_BYTES
        assert busy["tandem_kv_reserved_bytes", *PREFILL] == 0  # given back at the hand-off
        call.cancel()
        waiting.cancel()
        gate.open()
    await quiesce(cluster)

    after = await scrape(cluster)
    assert (after["tandem_requests_running",], after["tandem_requests_waiting",]) == (0, 0)
    assert after["tandem_kv_reserved_bytes", *DECODE] == 0
    cancelled = ("tandem_requests_total", "CLIENT_CANCELLED")
    assert after[cancelled] - idle[cancelled] == 11


async def test_a_refused_body_is_counted_as_one(cluster):
    before = await scrape(cluster)
    replies = await asyncio.gather(
        post(cluster.http_address, "/v1/completions", {"prompt": "x", "temperature": 3}),
        post(cluster.http_address, "/v1/completions", {"prompt": "x", "model": "other"}),
    )
    after = await scrape(cluster)
    for reply in replies:
        assert (
            after["tandem_admission_decisions_total", "refused", reply.code]
            == 1 + (before["tandem_admission_decisions_total", "refused", reply.code])
        )


async def test_the_documentation_names_every_metric_there_is(cluster):
    documented = set(re.findall(r"`(tandem_\w+)`", (ROOT / "docs" / "http.md").read_text()))
    reply = await get(cluster.http_address, "/metrics")
    served = set(re.findall(r"^# TYPE (\w+)", reply.body.decode(), re.MULTILINE))
    assert served == documented


async def test_tokens_that_come_late_are_counted_and_ask_for_decode_workers():
    """Every gap is longer than a microsecond, and none is longer than a minute."""
    for limit_s, is_late in ((1e-6, True), (60.0, False)):
        async with running(config(router={"http_port": 0, "itl_limit_s": limit_s})) as cluster:
            await generate(cluster, ask("a story", max_tokens=9, ignore_eos=True))
            await until(lambda: cluster.router._late_share._samples[-1][1])
            found = await scrape(cluster)
            gaps = found["tandem_inter_token_latency_seconds_count",]
            assert found["tandem_inter_token_latency_missed_total",] == (gaps if is_late else 0)
            assert cluster.router.demand().late_share == (1 if is_late else 0)
