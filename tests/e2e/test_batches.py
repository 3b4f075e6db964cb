"""/v1/files and /v1/batches with the official client, BatchService over gRPC, and what survives a restart."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import time
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import openai
import pytest
import pytest_asyncio

from deploy.embedded import EmbeddedService
from deploy.local import LocalCluster
from tandem.config import BatchConfig, SecurityConfig
from tandem.errors import ConfigError, FailedPrecondition, NotFound
from tandem.pb.v1 import batch_pb2 as pb
from tandem.pb.v1 import batch_pb2_grpc
from tandem.rpc import to_tandem_error
from tests.e2e.harness import config, quiesce, running, slow_steps
from tests.web import get, post, send

pytestmark = pytest.mark.asyncio(loop_scope="module")

COMPLETIONS = "/v1/completions"
PATIENCE_S = 60.0
NUM_KILLS = int(os.environ.get("TANDEM_BATCH_KILLS", "0"))  # of the whole service; 20 are the long tier
ENDED = ("completed", "failed", "expired", "cancelled")
GREEDY = {"ignore_eos": True, "temperature": 0}
TOKENS = {"alice": "a-token", "bob": "b-token"}


def settings(folder: Path, **limits):
    return replace(config(router={"http_port": 0}), batches=BatchConfig(dir=folder / "batches", **limits))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batches")
    keys = folder / "keys"
    keys.write_text("a-token tenant=alice\nb-token tenant=bob\n")
    keys.chmod(0o600)
    limits = {"max_file_bytes": 1 << 20, "max_tenant_bytes": 3 << 20, "max_tenant_files": 12}
    built = replace(settings(folder, **limits), security=SecurityConfig(api_key_file=keys))
    async with running(built) as started:
        yield started


@asynccontextmanager
async def client_of(cluster, tenant: str = "alice"):
    base_url = f"http://{cluster.http_address}/v1"
    async with openai.AsyncOpenAI(base_url=base_url, api_key=TOKENS[tenant], max_retries=0) as client:
        yield client


@pytest_asyncio.fixture(loop_scope="module")
async def client(cluster):
    async with client_of(cluster) as started:
        yield started
        for file in (await started.files.list()).data:  # each test has the whole of its tenant's limits
            await started.files.delete(file.id)
    await quiesce(cluster)


def line(number: int, max_tokens: int = 8, **body) -> dict:
    body = {
        "prompt": f"story {number}",
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "temperature": 0,
    } | body
    return {"custom_id": f"c{number}", "method": "POST", "url": COMPLETIONS, "body": body}


def as_file(lines) -> io.BytesIO:
    file = io.BytesIO("".join(json.dumps(one) + "\n" for one in lines).encode())
    file.name = "requests.jsonl"
    return file


async def start(client, lines, window: str = "24h", **options):
    file = await client.files.create(file=as_file(lines), purpose="batch")
    return await client.batches.create(
        input_file_id=file.id, endpoint=COMPLETIONS, completion_window=window, **options
    )


async def until(client, batch, *statuses: str):
    async with asyncio.timeout(PATIENCE_S):
        while batch.status not in statuses:
            await asyncio.sleep(0.02)
            batch = await client.batches.retrieve(batch.id)
    return batch


async def records(client, *file_ids: str | None) -> list[dict]:
    found = []
    for file_id in filter(None, file_ids):
        content = await client.files.content(file_id)
        found += [json.loads(one) for one in content.text.splitlines()]
    return found


async def assert_exactly_once(client, batch, count: int) -> dict[str, dict]:
    found = await records(client, batch.output_file_id, batch.error_file_id)
    assert Counter(record["custom_id"] for record in found) == Counter(f"c{n}" for n in range(count))
    return {record["custom_id"]: record for record in found}


# --- with the official client ---


async def test_a_file_is_kept_listed_read_and_deleted(client):
    sent = as_file([line(n) for n in range(3)])
    made = await client.files.create(file=sent, purpose="batch")
    assert (made.object, made.filename, made.purpose) == ("file", "requests.jsonl", "batch")
    assert made.bytes == len(sent.getvalue())
    assert made == await client.files.retrieve(made.id)
    assert [file.id for file in (await client.files.list(purpose="batch")).data] == [made.id]
    assert (await client.files.list(purpose="batch_output")).data == []
    assert (await client.files.content(made.id)).content == sent.getvalue()
    assert (await client.files.delete(made.id)).deleted
    with pytest.raises(openai.NotFoundError) as gone:
        await client.files.retrieve(made.id)
    assert gone.value.code == "NO_SUCH_FILE"


async def test_a_batch_answers_every_line_as_the_endpoint_would(cluster, client):
    lines = [line(n) for n in range(20)] + [line(20, temperature=9), {**line(21), "url": "/v1/embeddings"}]
    batch = await start(client, lines, metadata={"nightly": "yes"})
    assert (batch.object, batch.status, batch.endpoint) == ("batch", "validating", COMPLETIONS)
    batch = await until(client, batch, *ENDED)
    assert (batch.status, batch.metadata) == ("completed", {"nightly": "yes"})
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (22, 20, 2)
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    assert batch.expires_at == batch.created_at + 86400
    found = await assert_exactly_once(client, batch, 22)
    assert found["c20"]["error"]["code"] == "BAD_PARAM"
    assert "`url` must be" in found["c21"]["error"]["message"]
    whole = await client.completions.create(model="", prompt="story 7", extra_body=line(7)["body"])
    body = found["c7"]["response"]["body"]
    assert found["c7"]["response"]["status_code"] == 200
    assert body["choices"][0]["text"] == whole.choices[0].text
    assert body["usage"]["completion_tokens"] == 8
    assert {"ttft_ms", "queue_ms", "attempts"} <= found["c7"]["metrics"].keys()
    listed = await client.files.list(purpose="batch_output")
    assert {file.id for file in listed.data} == {batch.output_file_id, batch.error_file_id}


async def test_batches_are_listed_by_page_newest_first(client):
    made = [await start(client, [line(0)]) for _ in range(3)]
    for batch in made:
        await until(client, batch, "completed")
    listed = [batch.id async for batch in client.batches.list(limit=2)]
    assert set(listed[:3]) == {batch.id for batch in made}
    assert len(listed) == len(set(listed)) >= 3


async def test_a_file_that_cannot_be_a_batch_fails_it_and_says_why(client):
    twice = await until(client, await start(client, [line(0), line(1), line(0)]), *ENDED)
    [error] = twice.errors.data
    assert (twice.status, error.code, error.line) == ("failed", "duplicate_custom_id", 3)
    assert error.message.startswith("custom_id 'c0' is that of line 1 too")
    empty = await until(client, await start(client, []), *ENDED)
    assert (empty.status, empty.errors.data[0].code) == ("failed", "empty_file")


async def test_what_is_finished_stays_when_a_batch_is_cancelled(cluster, client):
    with slow_steps(cluster.decodes[0], 0.02):
        batch = await start(client, [line(n, 60) for n in range(120)])
        async with asyncio.timeout(PATIENCE_S):
            while batch.request_counts.completed < 3:
                batch = await client.batches.retrieve(batch.id)
                await asyncio.sleep(0.02)
        batch = await client.batches.cancel(batch.id)
        assert batch.status == "cancelling"
        batch = await until(client, batch, *ENDED)
    assert batch.status == "cancelled"
    assert 3 <= batch.request_counts.completed < 120
    found = await records(client, batch.output_file_id)
    assert len(found) == batch.request_counts.completed
    with pytest.raises(openai.APIStatusError) as refused:
        await client.batches.cancel(batch.id)
    assert (refused.value.status_code, refused.value.code) == (412, "BATCH_ENDED")


async def test_what_is_not_answered_in_time_is_a_failure(cluster, client):
    with slow_steps(cluster.decodes[0], 0.05):
        batch = await start(client, [line(n, 30) for n in range(200)], window="2s")
        batch = await until(client, batch, *ENDED)
    assert batch.status == "expired"
    found = await assert_exactly_once(client, batch, 200)
    codes = Counter(record["error"] and record["error"]["code"] for record in found.values())
    assert codes["batch_expired"] > 0
    assert codes["batch_expired"] + codes[None] == 200


async def test_interactive_requests_pass_a_batch(cluster, client):
    with slow_steps(cluster.decodes[0], 0.005):
        batch = await start(client, [line(n, 100) for n in range(300)])
        await until(client, batch, "in_progress")
        await asyncio.sleep(0.5)
        began_s = time.monotonic()
        for _ in range(5):
            await client.completions.create(model="", prompt="now", max_tokens=2)
        took_s = time.monotonic() - began_s
        batch = await client.batches.retrieve(batch.id)
        assert batch.request_counts.completed < 150, "the batch was over too soon to be passed"
        await client.batches.cancel(batch.id)
        await until(client, batch, "cancelled")
    assert took_s < 10


# --- who sees what ---


async def test_a_tenant_knows_of_nothing_that_is_anothers(cluster, client):
    batch = await until(client, await start(client, [line(0)]), "completed")
    async with client_of(cluster, "bob") as bob:
        assert [(await bob.files.list()).data, (await bob.batches.list()).data] == [[], []]
        for call in (bob.files.retrieve, bob.files.content, bob.files.delete):
            with pytest.raises(openai.NotFoundError):
                await call(batch.output_file_id)
        for call in (bob.batches.retrieve, bob.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                await call(batch.id)
        with pytest.raises(openai.NotFoundError):
            await bob.batches.create(
                input_file_id=batch.input_file_id, endpoint=COMPLETIONS, completion_window="24h"
            )


async def test_limits_of_bytes_and_files_hold_and_deleting_makes_room(client):
    with pytest.raises(openai.BadRequestError, match="`file` is larger than 1048576 bytes"):
        await client.files.create(file=("big", b"x" * ((1 << 20) + 1)), purpose="batch")
    for _ in range(3):
        last = await client.files.create(file=("big", b"x" * ((1 << 20) - 100)), purpose="batch")
    with pytest.raises(openai.RateLimitError, match="bytes of files is reached"):
        await client.files.create(file=("more", b"x" * 1000), purpose="batch")
    await client.files.delete(last.id)
    for _ in range(10):
        await client.files.create(file=("small", b"x"), purpose="batch")
    with pytest.raises(openai.RateLimitError, match="12 files is reached"):
        await client.files.create(file=("small", b"x"), purpose="batch")


FORM = "POST /v1/files HTTP/1.1\nauthorization: Bearer a-token\ncontent-type: "
MULTIPART = "multipart/form-data; boundary=b"


def part(disposition: str, value: bytes) -> bytes:
    return f"--b\r\ncontent-disposition: form-data; {disposition}\r\n\r\n".encode() + value + b"\r\n"


TUNE = part('name="purpose"', b"fine-tune")
FILE, PURPOSE = part('name="file"; filename="f"', b"x"), part('name="purpose"', b"batch")


@pytest.mark.parametrize(
    ("media", "body", "status", "says"),
    [
        ("application/json", b"{}", 415, "multipart/form-data"),
        ("multipart/form-data", b"--b--\r\n", 415, "multipart/form-data"),
        (MULTIPART, b"", 400, "not complete"),
        (MULTIPART, b"no form", 400, "not valid multipart"),
        (MULTIPART, FILE + PURPOSE, 400, "not complete"),
        (MULTIPART, PURPOSE + b"--b--\r\n", 400, "`file` must be given"),
        (MULTIPART, FILE + b"--b--\r\n", 400, "`purpose` must be batch"),
        (
            MULTIPART,
            FILE + TUNE + b"--b--\r\n",
            400,
            "`purpose` must be batch",
        ),
        (MULTIPART, FILE + FILE + PURPOSE + b"--b--\r\n", 400, "`file` must be given once"),
        (MULTIPART, FILE + PURPOSE + part('name="x"', b"y") + b"--b--\r\n", 400, "`x` is not a parameter"),
        (MULTIPART, PURPOSE + part('name="x"', b"y" * 2000), 400, "`x` is too long"),
        (MULTIPART, b"--b\r\nx: " + b"y" * 3000 + b"\r\n\r\n", 400, "too long"),
    ],
)
async def test_what_is_no_upload_is_refused_and_leaves_nothing(cluster, client, media, body, status, says):
    reply = await send(cluster.http_address, FORM + media, body)
    assert reply.status == status
    assert says in reply.json()["error"]["message"]
    assert (await client.files.list()).data == []
    assert not list(cluster.router.batches.files._folder.glob("*.data"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"endpoint": "/v1/embeddings"}, "`endpoint` must be one of"),
        ({"completion_window": "soon"}, "`completion_window` must be"),
        ({"completion_window": "15d"}, "`completion_window` must be"),
        ({"input_file_id": None}, "`input_file_id` must be given"),
        ({"input_file_id": "file-none"}, "not found"),
        ({"metadata": {"a": 1}}, "`metadata` must be"),
        ({"metadata": {"a" * 65: "x"}}, "`metadata` has names"),
        ({"surprise": 1}, "`surprise` is not a parameter"),
    ],
)
async def test_what_is_no_batch_is_refused(cluster, client, change, says):
    file = await client.files.create(file=as_file([line(0)]), purpose="batch")
    body = {"input_file_id": file.id, "endpoint": COMPLETIONS, "completion_window": "24h"} | change
    head = "POST /v1/batches HTTP/1.1\nauthorization: Bearer a-token\ncontent-type: application/json"
    reply = await send(cluster.http_address, head, json.dumps(body).encode())
    assert reply.status in (400, 404)
    assert says in reply.json()["error"]["message"]


# --- over gRPC ---


@asynccontextmanager
async def stub_of(cluster, tenant: str = "alice"):
    """Calls as a tenant, whose failures are ours."""
    metadata = (("authorization", f"Bearer {TOKENS[tenant]}"),)
    stub = batch_pb2_grpc.BatchServiceStub(cluster.channel)

    class Calls:
        def __getattr__(self, name):
            def call(request):
                return getattr(stub, name)(request, metadata=metadata)

            return call

    try:
        yield Calls()
    except grpc.aio.AioRpcError as error:
        raise to_tandem_error(error) from error


async def submit(stub, batch_id: str, count: int):
    async def requests():
        for n in range(count):
            body = json.dumps(line(n)["body"]) if n % 10 != 9 else "{broken"
            yield pb.SubmitBatchRequestsRequest(batch_id=batch_id, custom_id=f"c{n}", body=body)

    return (await stub.SubmitBatchRequests(requests())).batch


async def test_requests_are_submitted_and_results_streamed_over_grpc(cluster, client):
    async with stub_of(cluster) as stub:
        made = (await stub.CreateBatch(pb.CreateBatchRequest(endpoint=COMPLETIONS))).batch
        assert pb.BatchStatus.Name(made.status) == "BATCH_STATUS_VALIDATING"
        await submit(stub, made.id, 30)
        results = [
            result async for result in stub.StreamBatchResults(pb.StreamBatchResultsRequest(batch_id=made.id))
        ]
        ended = (await stub.GetBatch(pb.GetBatchRequest(batch_id=made.id))).batch
        assert (ended.total, ended.completed, ended.failed) == (30, 27, 3)
        assert pb.BatchStatus.Name(ended.status) == "BATCH_STATUS_COMPLETED"
        assert Counter(result.custom_id for result in results if result.status_code == 200) == Counter(
            f"c{n}" for n in range(30) if n % 10 != 9
        )
        bad = [result for result in results if result.error_code]
        assert sorted(result.line for result in bad) == [10, 20, 30]
        assert {result.error_code for result in bad} == {"BAD_LINE"}

        middle = pb.StreamBatchResultsRequest(batch_id=made.id, resume_token=results[11].resume_token)
        rest = {result.line async for result in stub.StreamBatchResults(middle)}
        assert {result.line for result in results[:12]} | rest == set(range(1, 31))
        assert len(rest) < 30
        listed = (await stub.ListBatches(pb.ListBatchesRequest(page_size=1))).batches
        assert [batch.id for batch in listed] == [made.id]
    alone = await client.completions.create(model="", prompt="story 3", extra_body=line(3)["body"])
    [third] = [result for result in results if result.custom_id == "c3"]
    assert json.loads(third.body)["choices"][0]["text"] == alone.choices[0].text


async def test_grpc_refuses_what_is_anothers_or_too_late(cluster, client):
    async with stub_of(cluster) as stub:
        made = (await stub.CreateBatch(pb.CreateBatchRequest(endpoint=COMPLETIONS))).batch
        with pytest.raises(NotFound, match="NO_SUCH_BATCH"):
            async with stub_of(cluster, "bob") as bob:
                await bob.GetBatch(pb.GetBatchRequest(batch_id=made.id))
        request = pb.StreamBatchResultsRequest(batch_id=made.id, resume_token="x")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await anext(aiter(stub.StreamBatchResults(request)))
        assert "`resume_token` must be" in refused.value.details()
        cancelled = (await stub.CancelBatch(pb.CancelBatchRequest(batch_id=made.id))).batch
        assert cancelled.status in (pb.BATCH_STATUS_CANCELLING, pb.BATCH_STATUS_CANCELLED)
        with pytest.raises(FailedPrecondition, match="takes no more requests"):
            async with stub_of(cluster) as other:
                await submit(other, made.id, 1)


# --- without a folder, and after a restart ---


async def test_without_a_folder_both_fronts_say_how_to_get_one():
    async with running(config(router={"http_port": 0})) as cluster:
        for path in ("/v1/files", "/v1/batches/x"):
            reply = await get(cluster.http_address, path)
            assert (reply.status, reply.code) == (412, "NO_BATCHES")
            assert "--batch-dir" in reply.json()["error"]["message"]
        reply = await post(cluster.http_address, "/v1/batches", {})
        assert reply.code == "NO_BATCHES"
        stub = batch_pb2_grpc.BatchServiceStub(cluster.channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ListBatches(pb.ListBatchesRequest())
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def answered(client, batch, count: int):
    """Until so many of its lines are."""
    async with asyncio.timeout(PATIENCE_S):
        while batch.request_counts.completed < count:
            await asyncio.sleep(0.02)
            batch = await client.batches.retrieve(batch.id)
    assert batch.status == "in_progress", "all was done before the service ended: give it more to do"


def plain_client(base_url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0)


async def test_a_batch_goes_on_when_the_service_comes_back(tmp_path: Path):
    built = settings(tmp_path)
    async with LocalCluster(built) as cluster:
        async with plain_client(f"http://{cluster.http_address}/v1") as client:
            with slow_steps(cluster.decodes[0], 0.01):
                batch = await start(client, [line(n, 40) for n in range(150)])
                next_one = await start(client, [line(n) for n in range(5)])
                await answered(client, batch, 10)
        with pytest.raises(ConfigError, match="another process keeps batches in"):
            await LocalCluster(built).__aenter__()
    async with running(built) as cluster, plain_client(f"http://{cluster.http_address}/v1") as client:
        assert (await client.batches.retrieve(batch.id)).request_counts.completed >= 10
        for one, count in ((batch, 150), (next_one, 5)):
            ended = await until(client, one, *ENDED)
            assert ended.status == "completed"
            await assert_exactly_once(client, ended, count)


@pytest.mark.e2e
@pytest.mark.skipif(not NUM_KILLS, reason="20 s for each kill: set TANDEM_BATCH_KILLS")
@pytest.mark.timeout(1200)
async def test_a_killed_service_loses_and_repeats_no_line_of_a_batch(tmp_path: Path):
    built, count, batch = settings(tmp_path), 100 + 150 * NUM_KILLS, None
    for kill in range(NUM_KILLS + 1):
        async with EmbeddedService(built) as service, plain_client(service.base_url) as client:
            batch = batch or await start(client, [line(n, 60) for n in range(count)])
            batch = await client.batches.retrieve(batch.id)
            if kill < NUM_KILLS:
                await answered(client, batch, 10 + 150 * kill)
                os.kill(service.pids()["router"], signal.SIGKILL)
                continue
            ended = await until(client, batch, *ENDED)
            assert (ended.status, ended.request_counts.completed) == ("completed", count)
            await assert_exactly_once(client, ended, count)
