"""The OpenAI HTTP API as an ASGI app, on the same intake and dispatcher as the gRPC front.

It knows no sockets: `router.http.server` listens for it, and whatever else speaks ASGI can.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from router.ask import SESSION_HEADER
from router.batches.service import Batches
from router.dispatch import Dispatcher
from router.http.answer import Answer
from router.http.batches import BatchFront
from router.http.body import Fields, read_object
from router.http.door import TENANT, Door
from router.http.errors import Json
from router.http.generation import parse_chat, parse_completion, take_chat_prompt
from router.intake import Intake
from tandem.chat_template import ChatTemplate
from tandem.config import ClusterConfig
from tandem.errors import NotFound
from tandem.metrics import CONTENT_TYPE
from tandem.sampling import bad_param
from tandem.security import tokens_of


def build_app(
    config: ClusterConfig, intake: Intake, dispatcher: Dispatcher, batches: Batches | None
) -> ASGIApp:
    """The app of one router. Raises `ConfigError` if the tokens' file or the chat template is unusable."""
    front = _Front(intake, dispatcher, ChatTemplate.from_dir(config.model.path))
    routes = [
        Route("/v1/completions", front.completions, methods=["POST"]),
        Route("/v1/chat/completions", front.chat_completions, methods=["POST"]),
        Route("/v1/models", front.models, methods=["GET"]),
        Route("/v1/models/{model:path}", front.model, methods=["GET"]),
        Route("/tokenize", front.tokenize, methods=["POST"]),
        Route("/detokenize", front.detokenize, methods=["POST"]),
        Route("/health", front.ready, methods=["GET"]),
        Route("/health/live", front.live, methods=["GET"]),
        Route("/version", front.version, methods=["GET"]),
        Route("/metrics", front.metrics, methods=["GET"]),
        *BatchFront(batches).routes(),
    ]
    return Door(Router(routes, redirect_slashes=False), tokens_of(config.security))


class _Front:
    """The endpoints: bodies to requests, and requests to answers. No scheduling here."""

    def __init__(self, intake: Intake, dispatcher: Dispatcher, template: ChatTemplate | None) -> None:
        self._intake = intake
        self._dispatcher = dispatcher
        self._template = template
        self._created = int(time.time())

    async def completions(self, request: Request) -> Answer:
        return self._answer(parse_completion, request, await read_object(request), self._intake)

    async def chat_completions(self, request: Request) -> Answer:
        return self._answer(parse_chat, request, await read_object(request), self._template)

    async def models(self, request: Request) -> Response:
        return Json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        if request.path_params["model"] != self._intake.model_name:
            raise NotFound("NO_SUCH_MODEL", "not found")
        return Json(self._model())

    async def tokenize(self, request: Request) -> Response:
        """vLLM's endpoint: a `prompt`, or the `messages` of a chat."""
        fields = Fields(await read_object(request))
        self._take_model(fields)
        prompt = fields.take("prompt")
        with_special_tokens = fields.take("add_special_tokens")
        if prompt is None:
            text, default = take_chat_prompt(fields, self._template), False
        else:
            text, default = prompt, True
        if not isinstance(text, str):
            raise bad_param("`prompt` must be a string")
        if with_special_tokens not in (None, True, False):
            raise bad_param("`add_special_tokens` must be true or false")
        fields.finish()
        add = default if with_special_tokens is None else bool(with_special_tokens)
        token_ids = await self._intake.tokenize(text, add_special_tokens=add)
        return Json({"tokens": token_ids, "count": len(token_ids), "max_model_len": self._intake.max_context})

    async def detokenize(self, request: Request) -> Response:
        fields = Fields(await read_object(request))
        self._take_model(fields)
        token_ids = fields.integers("tokens")
        fields.finish()
        return Json({"prompt": self._intake.detokenize(token_ids)})

    async def ready(self, request: Request) -> Response:
        """Whether requests can be served now: for load balancers."""
        self._dispatcher.check_ready()
        return Json({"status": "ready"})

    async def live(self, request: Request) -> Response:
        """Whether this process answers: for whoever restarts it."""
        return Json({"status": "live"})

    async def version(self, request: Request) -> Response:
        return Json({"version": version("tandem-serve")})

    async def metrics(self, request: Request) -> Response:
        return Response(self._dispatcher.metrics.exposition(), media_type=CONTENT_TYPE)

    def _answer(
        self, parse: Callable[..., Any], request: Request, body: dict[str, Any], context: object
    ) -> Answer:
        with self._dispatcher.metrics.refusals():
            session = request.headers.get(SESSION_HEADER, "")
            generation = parse(body, context).of_caller(request.scope[TENANT], session)
        return Answer(generation, self._dispatcher, self._intake)

    def _take_model(self, fields: Fields) -> None:
        if fields.text("model") not in ("", self._intake.model_name):
            raise NotFound("NO_SUCH_MODEL", "not found")

    def _model(self) -> dict[str, Any]:
        """OpenAI's members, and vLLM's for the context length."""
        return {
            "id": self._intake.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "tandem",
            "max_model_len": self._intake.max_context,
        }
