"""Where load goes: a service that streams tokens, over gRPC or HTTP."""

from __future__ import annotations

import hashlib
import ssl
import time
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import grpc

from bench.serve.sse import post_events
from bench.serve.workload import LoadRequest
from tandem.client import SESSION_HEADER, TandemClient
from tandem.errors import ConfigError, TandemError
from tandem.pb.v1 import generation_pb2 as pb
from tandem.request import Timings
from tandem.sampling import SamplingParams

CONNECTIONS = 4


@dataclass(slots=True)
class Reply:
    """What has come of one request so far. Times are those of `time.perf_counter`."""

    arrivals: list[tuple[float, int]] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    stages_ms: dict[str, float] = field(default_factory=dict)
    drafted: int = 0
    accepted: int = 0
    cached_tokens: int = 0
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)  # where the service says them
    text: Any = field(default_factory=hashlib.sha256)  # the digest of what came

    def note(self, num_tokens: int, text: str) -> None:
        """Tokens have just come."""
        self.arrivals.append((time.perf_counter(), num_tokens))
        self.output_tokens += num_tokens
        self.texts.append(text)
        self.text.update(text.encode("utf-8", "surrogatepass"))


class SendError(Exception):
    """The service refused or failed. The message is the reason's stable name."""


class Target(Protocol):
    """One service."""

    async def send(self, request: LoadRequest, reply: Reply) -> None:
        """Stream one request to its end, into `reply`. Raises `SendError`."""

    async def close(self) -> None: ...


class GrpcTarget:
    """A Tandem service at host:port. Several connections, as one carries only so many streams."""

    def __init__(
        self, address: str, *, token: str | None = None, credentials: grpc.ChannelCredentials | None = None
    ) -> None:
        clients = (TandemClient(address, token=token, credentials=credentials) for _ in range(CONNECTIONS))
        self._clients = list(clients)
        self._num_sent = 0

    async def send(self, request: LoadRequest, reply: Reply) -> None:
        self._num_sent += 1
        client = self._clients[self._num_sent % len(self._clients)]
        sampling = SamplingParams(max_tokens=request.max_tokens, ignore_eos=request.ignore_eos)
        try:
            async with aclosing(client.stream(request.prompt, sampling, session=request.session)) as events:
                async for event in events:
                    match event.WhichOneof("event"):
                        case "token_chunk":
                            reply.note(len(event.token_chunk.token_ids), event.token_chunk.text)
                            reply.token_ids.extend(event.token_chunk.token_ids)
                        case "finished":
                            _finish(reply, event.finished)
        except TandemError as error:
            raise SendError(error.reason) from error

    async def facts(self) -> tuple[str, int, int]:
        """Name, vocabulary size and longest context of the model. Raises `TandemError`."""
        model = (await self._clients[0].models())[0]
        return model.name, model.vocab_size, model.max_context

    async def close(self) -> None:
        for client in self._clients:
            await client.__aexit__(None, None, None)


class HttpTarget:
    """Any server with OpenAI's /v1/completions at a URL such as http://host:8000."""

    def __init__(
        self,
        url: str,
        model: str,
        token: str | None = None,
        tls_ca: Path | None = None,
        *,
        with_ids: bool = False,
    ) -> None:
        """`tls_ca` is trusted instead of the system's authorities. Raises `ConfigError` if it is no URL.

        `with_ids` asks for `token_ids`, as vLLM and Tandem have them: tokens without text are then seen, too.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url} is no URL such as http://127.0.0.1:8000")
        self._host, self._port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context(cafile=tls_ca) if parts.scheme == "https" else None
        self._path = parts.path.rstrip("/").removesuffix("/v1") + "/v1/completions"
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._model = model
        self._more = {"return_token_ids": True} if with_ids else {}

    async def send(self, request: LoadRequest, reply: Reply) -> None:
        if request.then is not None and not isinstance(request.prompt, str):
            raise ConfigError("over HTTP answers are text: conversations need --input with text, or gRPC")
        body = {
            "model": self._model,
            "prompt": request.prompt,
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if request.ignore_eos else {}),
            **self._more,
        }
        usage: dict[str, Any] = {}
        try:
            where = (self._host, self._port, self._path)
            headers = self._headers | ({SESSION_HEADER: request.session} if request.session else {})
            async with aclosing(post_events(*where, body, headers, self._tls)) as events:
                async for event in events:
                    if "error" in event:
                        raise SendError(str(event["error"].get("code") or event["error"].get("type")))
                    for choice in event.get("choices") or []:
                        token_ids = choice.get("token_ids") or ()
                        if token_ids or choice.get("text"):
                            reply.note(len(token_ids) or 1, choice.get("text") or "")
                            reply.token_ids.extend(token_ids)
                    usage = event.get("usage") or usage
        except OSError as error:
            raise SendError(f"NO_CONNECTION ({type(error).__name__})") from error
        if usage:  # an event may bring several tokens, or a piece of one
            reply.prompt_tokens, reply.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
            reply.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0

    async def close(self) -> None:
        """Every request has a connection of its own, which ended with it."""


def _finish(reply: Reply, finished: pb.Finished) -> None:
    reply.prompt_tokens, reply.output_tokens = finished.usage.prompt, finished.usage.completion
    reply.drafted, reply.accepted = finished.usage.drafted, finished.usage.accepted
    reply.cached_tokens = finished.usage.cached
    reply.stages_ms = Timings.from_pb(finished.timings).milliseconds()
