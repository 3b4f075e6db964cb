"""A Python client: start a request, follow its events, get the same errors the server raised."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, cast

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.errors import InvalidRequest, TandemError, Unavailable, error_from_reason
from tandem.pb.v1 import generation_pb2 as pb
from tandem.pb.v1 import generation_pb2_grpc, model_pb2, model_pb2_grpc
from tandem.progress import StreamProgress
from tandem.rpc import channel, to_tandem_error
from tandem.rpc_auth import bearer
from tandem.sampling import SamplingParams
from tandem.speculation import SpeculationParams

SERVING = health_pb2.HealthCheckResponse.SERVING
SESSION_HEADER = "x-session-id"  # metadata: whose requests a session policy keeps together
RETRY_S = 0.05
RESUME_S = 30.0


class TandemClient:
    """One connection to a Tandem server at `address` (host:port). Use it as an async context.

    `token` is sent with every call; `credentials` are those of `tandem.security.client_credentials`
    for a server with TLS, and `server_name` what its certificate is good for, if that is not its address.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        server_name: str = "",
    ) -> None:
        self.address = address
        self._metadata = bearer(token)
        self._channel = channel(address, credentials, retries=True, server_name=server_name)
        self._generation: Any = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._models: Any = model_pb2_grpc.ModelServiceStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def stream(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        request_id: str = "",
        priority: int = 0,
        speculation: SpeculationParams | None = None,
        timeout_s: float | None = None,
        resume_s: float = RESUME_S,
        session: str = "",
    ) -> AsyncGenerator[pb.StreamGenerateResponse]:
        """Events as they happen: Admitted, TokenChunks, one Finished per completion.

        A stream that is lost after it began is taken up again for `resume_s`, with no token doubled or
        missing; only one of several completions, or of policy AUTO, cannot be (`tandem.progress`). Raises
        the server's `TandemError`. Leaving the iteration early cancels the request.
        """
        message = generation_input(
            prompt, sampling, request_id=request_id, priority=priority, speculation=speculation
        )
        progress = StreamProgress(message, timeout_s, resume_s)
        while True:
            try:
                async with aclosing(self._events(progress, session)) as events:
                    async for event in events:
                        if (new := progress.take(event)) is not None:
                            yield new
                return
            except TandemError as error:
                if progress.has_ended:
                    return
                wait_s = progress.wait_after(error)
            await asyncio.sleep(wait_s)

    async def _events(
        self, progress: StreamProgress, session: str
    ) -> AsyncGenerator[pb.StreamGenerateResponse]:
        """One call."""
        call = self._generation.StreamGenerate(
            pb.StreamGenerateRequest(input=progress.rest()),
            timeout=progress.time_left_s,
            metadata=(*self._metadata, (SESSION_HEADER, session)) if session else self._metadata,
        )
        try:
            async for event in call:
                yield event
        except grpc.aio.AioRpcError as error:
            raise as_tandem_error(error, self.address) from error
        finally:
            call.cancel()

    async def generate(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        request_id: str = "",
        priority: int = 0,
        speculation: SpeculationParams | None = None,
        timeout_s: float | None = None,
    ) -> pb.GenerateResponse:
        """All completions at once. Raises the server's `TandemError`."""
        message = generation_input(
            prompt, sampling, request_id=request_id, priority=priority, speculation=speculation
        )
        response = await self._call(self._generation.Generate, pb.GenerateRequest(input=message), timeout_s)
        assert isinstance(response, pb.GenerateResponse)
        return response

    async def cancel(self, request_id: str) -> None:
        """End a running request. Raises `NO_SUCH_REQUEST`."""
        await self._call(self._generation.CancelGeneration, pb.CancelGenerationRequest(request_id=request_id))

    async def tokenize(self, text: str) -> list[int]:
        """Token ids by the served model's tokenizer. Raises `PROMPT_TOO_LONG`."""
        response = await self._call(self._generation.Tokenize, pb.TokenizeRequest(text=text))
        return list(response.token_ids)

    async def models(self) -> list[model_pb2.Model]:
        """What is served."""
        response = await self._call(self._models.ListModels, model_pb2.ListModelsRequest())
        return list(response.models)

    async def wait_until_serving(self, timeout_s: float) -> None:
        """Until the server has workers of each kind. Raises `Unavailable` when the time is over."""
        try:
            async with asyncio.timeout(timeout_s):
                while not await self._is_serving():  # noqa: ASYNC110 (until the port opens there is no event)
                    await asyncio.sleep(RETRY_S)
        except TimeoutError:
            raise Unavailable(
                "NO_DECODE", f"the server at {self.address} was not ready within {timeout_s:g} s"
            ) from None

    async def _is_serving(self) -> bool:
        """Follow the health service until it says SERVING; False if the connection was lost meanwhile."""
        call = self._health.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True)
        try:
            async for response in call:
                if response.status == SERVING:
                    return True
        except grpc.aio.AioRpcError:
            pass
        finally:
            call.cancel()
        return False

    async def _call(self, method: Any, request: Any, timeout_s: float | None = None) -> Any:
        try:
            return await method(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise as_tandem_error(error, self.address) from error


def as_tandem_error(error: grpc.RpcError, address: str) -> TandemError:
    """What a failed call to `address` means: the server's own error, or why there is none."""
    call = cast(grpc.aio.AioRpcError, error)  # the errors of both kinds of channel have its methods
    match call.code():
        case grpc.StatusCode.DEADLINE_EXCEEDED:  # noticed on this side first
            otherwise = error_from_reason("DEADLINE_DECODE", "deadline passed before the last token")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:  # refused by gRPC itself
            otherwise = InvalidRequest("BAD_MESSAGE", f"a message is too large: {call.details()}")
        case grpc.StatusCode.UNIMPLEMENTED:
            other = f"{address} does not answer that call; is it another of the server's ports?"
            otherwise = InvalidRequest("BAD_PARAM", other)
        case code:
            silent = f"no answer from {address} ({code.name}); is the server running?"
            otherwise = Unavailable("DRAINING", silent)
    return to_tandem_error(call, otherwise)


def generation_input(
    prompt: str | Sequence[int],
    sampling: SamplingParams | None = None,
    *,
    request_id: str = "",
    priority: int = 0,
    speculation: SpeculationParams | None = None,
) -> pb.GenerationInput:
    """The wire message of a request; `prompt` is text or token ids."""
    message = pb.GenerationInput(
        request_id=request_id,
        sampling=(sampling or SamplingParams()).to_pb(),
        priority=priority,
        speculation=speculation.to_pb() if speculation else None,
    )
    if isinstance(prompt, str):
        message.text = prompt
    else:
        message.token_ids.ids.extend(prompt)
    return message
