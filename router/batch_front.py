"""tandem.v1.BatchService: wire messages to batches, records to wire messages. No scheduling here."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc

from tandem.errors import FailedPrecondition
from tandem.pb.v1 import batch_pb2 as pb
from tandem.pb.v1 import batch_pb2_grpc
from tandem.rpc_auth import TENANT
from tandem.sampling import bad_param

if TYPE_CHECKING:
    from router.batches.batch import Batch
    from router.batches.service import Batches

Context = grpc.aio.ServicerContext[Any, Any]

PAGE, MAX_PAGE = 20, 100
DEFAULT_WINDOW = "24h"
POSITION = re.compile(r"(\d{1,18}):(\d{1,18})")


def no_batches() -> FailedPrecondition:
    told = "this service keeps no batches; its operator can start it with --batch-dir FOLDER"
    return FailedPrecondition("NO_BATCHES", told)


class BatchServicer(batch_pb2_grpc.BatchServiceServicer):
    """Over the batches of one router; without any, every call says so."""

    def __init__(self, batches: Batches | None) -> None:
        self._kept = batches

    async def CreateBatch(self, request: pb.CreateBatchRequest, context: Context) -> pb.CreateBatchResponse:
        window = request.completion_window
        text = f"{window.seconds}s" if request.HasField("completion_window") else DEFAULT_WINDOW
        metadata = dict(request.metadata)
        batch = await self._batches.create(
            TENANT.get(), request.endpoint, text, request.input_file_id, metadata
        )
        return pb.CreateBatchResponse(batch=_to_pb(batch))

    async def SubmitBatchRequests(
        self, requests: AsyncIterator[pb.SubmitBatchRequestsRequest], context: Context
    ) -> pb.SubmitBatchRequestsResponse:
        batches, tenant = self._batches, TENANT.get()
        first = await anext(aiter(requests), None)
        if first is None:
            raise bad_param("a batch needs at least one request")
        url = batches.get(tenant, first.batch_id).endpoint
        lines = _lines(first, requests, url)
        return pb.SubmitBatchRequestsResponse(
            batch=_to_pb(await batches.submit(tenant, first.batch_id, lines))
        )

    async def GetBatch(self, request: pb.GetBatchRequest, context: Context) -> pb.GetBatchResponse:
        return pb.GetBatchResponse(batch=_to_pb(self._batches.get(TENANT.get(), request.batch_id)))

    async def ListBatches(self, request: pb.ListBatchesRequest, context: Context) -> pb.ListBatchesResponse:
        size = min(request.page_size or PAGE, MAX_PAGE)
        found = self._batches.of(TENANT.get())
        names = [batch.id for batch in found]
        if request.page_token and request.page_token not in names:
            raise bad_param("`page_token` must be one of an earlier answer")
        begin = names.index(request.page_token) + 1 if request.page_token else 0
        page = found[begin : begin + size]
        following = page[-1].id if begin + size < len(found) else ""
        return pb.ListBatchesResponse(batches=map(_to_pb, page), next_page_token=following)

    async def CancelBatch(self, request: pb.CancelBatchRequest, context: Context) -> pb.CancelBatchResponse:
        batch = await self._batches.cancel(TENANT.get(), request.batch_id)
        return pb.CancelBatchResponse(batch=_to_pb(batch))

    async def StreamBatchResults(
        self, request: pb.StreamBatchResultsRequest, context: Context
    ) -> AsyncIterator[pb.StreamBatchResultsResponse]:
        from router.batches.records import places, read_on

        batches, tenant = self._batches, TENANT.get()
        positions = _positions(request.resume_token)
        pulse = batches.pulse(request.batch_id)
        while True:
            following = pulse.next()
            batch = batches.get(tenant, request.batch_id)
            is_over = True
            for which, path in enumerate(places(batch, batches.book, batches.files)):
                records, after = await asyncio.to_thread(read_on, path, positions[which])
                is_over = is_over and after == positions[which]
                for end, record in records:
                    positions[which] = end
                    yield _result_to_pb(record, positions)
            if is_over and batch.status.has_ended:
                return
            if is_over:
                await following.wait()

    @property
    def _batches(self) -> Batches:
        if self._kept is None:
            raise no_batches()
        return self._kept


async def _lines(
    first: pb.SubmitBatchRequestsRequest, rest: AsyncIterator[pb.SubmitBatchRequestsRequest], url: str
) -> AsyncIterator[bytes]:
    """Lines of the Batch format. A body that is no JSON becomes a bad line, like any other."""
    yield _line(first, url)
    async for message in rest:
        if message.batch_id not in ("", first.batch_id):
            raise bad_param("`batch_id` must be the same in all messages of a stream")
        yield _line(message, url)


def _line(message: pb.SubmitBatchRequestsRequest, url: str) -> bytes:
    """The body goes in as it is, so that whatever is wrong with it is found where all lines are checked."""
    name = json.dumps({"custom_id": message.custom_id, "method": "POST", "url": url})
    body = " ".join(message.body.split("\n")) or "null"
    return f'{name[:-1]}, "body": {body}}}\n'.encode()


def _positions(token: str) -> list[int]:
    if not token:
        return [0, 0]
    found = POSITION.fullmatch(token)
    if found is None:
        raise bad_param("`resume_token` must be one of an earlier result")
    return [int(found[1]), int(found[2])]


def _result_to_pb(record: dict[str, Any], positions: list[int]) -> pb.StreamBatchResultsResponse:
    response, error = record["response"] or {}, record["error"] or {}
    return pb.StreamBatchResultsResponse(
        custom_id=record["custom_id"],
        line=record["line"],
        status_code=response.get("status_code", 0),
        body=json.dumps(response["body"]) if response else "",
        error_code=error.get("code", ""),
        error_message=error.get("message", ""),
        resume_token=f"{positions[0]}:{positions[1]}",
    )


def _to_pb(batch: Batch) -> pb.Batch:
    message = pb.Batch(
        id=batch.id,
        endpoint=batch.endpoint,
        status=pb.BatchStatus.Value(f"BATCH_STATUS_{batch.status.name}"),
        input_file_id=batch.input_file_id,
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        total=batch.total,
        completed=batch.completed,
        failed=batch.failed,
        metadata=batch.metadata,
        errors=[
            pb.BatchError(code=error["code"], message=error["message"], line=error["line"] or 0)
            for error in batch.errors
        ],
    )
    message.created_at.FromSeconds(batch.created_s)
    message.expires_at.FromSeconds(batch.expires_s)
    return message
