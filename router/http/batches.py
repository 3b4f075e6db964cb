"""/v1/files and /v1/batches in OpenAI's shapes, over the batches of one router."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from router.batch_front import no_batches
from router.http.body import Fields, read_object
from router.http.door import TENANT
from router.http.errors import Json
from router.http.upload import receive_file
from tandem.sampling import bad_param

if TYPE_CHECKING:
    from router.batches.service import Batches

PAGE, MAX_BATCHES, MAX_FILES = 20, 100, 10_000


class Listed(Protocol):
    """What lists hold."""

    @property
    def id(self) -> str: ...

    def to_json(self) -> dict[str, Any]: ...


class BatchFront:
    """The endpoints. Without batches, every one of them says so."""

    def __init__(self, batches: Batches | None) -> None:
        self._kept = batches

    def routes(self) -> list[Route]:
        return [
            Route("/v1/files", self.upload, methods=["POST"]),
            Route("/v1/files", self.files, methods=["GET"]),
            Route("/v1/files/{id}", self.file, methods=["GET"]),
            Route("/v1/files/{id}", self.delete_file, methods=["DELETE"]),
            Route("/v1/files/{id}/content", self.content, methods=["GET"]),
            Route("/v1/batches", self.create, methods=["POST"]),
            Route("/v1/batches", self.batches, methods=["GET"]),
            Route("/v1/batches/{id}", self.batch, methods=["GET"]),
            Route("/v1/batches/{id}/cancel", self.cancel, methods=["POST"]),
        ]

    async def upload(self, request: Request) -> Response:
        upload = await asyncio.to_thread(self._batches.files.upload, _tenant(request))
        try:
            return Json((await receive_file(request, upload)).to_json())
        finally:
            upload.abandon()

    async def files(self, request: Request) -> Response:
        purpose = request.query_params.get("purpose")
        files = self._batches.files.of(_tenant(request))
        return _page([file for file in files if purpose in (None, file.purpose)], request, MAX_FILES)

    async def file(self, request: Request) -> Response:
        return Json(self._batches.files.get(_tenant(request), request.path_params["id"]).to_json())

    async def content(self, request: Request) -> Response:
        file = self._batches.files.get(_tenant(request), request.path_params["id"])
        return FileResponse(self._batches.files.path(file), media_type="application/octet-stream")

    async def delete_file(self, request: Request) -> Response:
        file = self._batches.files.get(_tenant(request), request.path_params["id"])
        await asyncio.to_thread(self._batches.files.delete, file)
        return Json({"id": file.id, "object": "file", "deleted": True})

    async def create(self, request: Request) -> Response:
        batches = self._batches
        fields = Fields(await read_object(request))
        file_id, endpoint = fields.text("input_file_id"), fields.text("endpoint")
        window, metadata = fields.text("completion_window"), fields.object("metadata")
        fields.finish()
        if not file_id:
            raise bad_param("`input_file_id` must be given")
        return Json((await batches.create(_tenant(request), endpoint, window, file_id, metadata)).to_json())

    async def batches(self, request: Request) -> Response:
        return _page(self._batches.of(_tenant(request)), request, MAX_BATCHES)

    async def batch(self, request: Request) -> Response:
        return Json(self._batches.get(_tenant(request), request.path_params["id"]).to_json())

    async def cancel(self, request: Request) -> Response:
        return Json((await self._batches.cancel(_tenant(request), request.path_params["id"])).to_json())

    @property
    def _batches(self) -> Batches:
        if self._kept is None:
            raise no_batches()
        return self._kept


def _tenant(request: Request) -> str:
    tenant: str = request.scope[TENANT]
    return tenant


def _page(found: Sequence[Listed], request: Request, most: int) -> Json:
    """A part of a list, newest first unless `order` says otherwise. Raises `BAD_PARAM`."""
    limit, after = request.query_params.get("limit", str(PAGE)), request.query_params.get("after")
    order = request.query_params.get("order", "desc")
    if not limit.isdecimal() or not 0 < int(limit) <= most:
        raise bad_param(f"`limit` must be between 1 and {most}")
    if order not in ("asc", "desc"):
        raise bad_param("`order` must be asc or desc")
    ordered = list(found) if order == "desc" else list(reversed(found))
    names = [item.id for item in ordered]
    if after is not None and after not in names:
        raise bad_param("`after` must be one of the list")
    begin = names.index(after) + 1 if after is not None else 0
    page = [item.to_json() for item in ordered[begin : begin + int(limit)]]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {}
    return Json({"object": "list", "data": page, "has_more": begin + int(limit) < len(ordered), **ends})
