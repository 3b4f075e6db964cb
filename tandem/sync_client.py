"""The Python client for code without an event loop: the same calls, errors and resumed streams, blocking."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from types import TracebackType
from typing import Any, Self

import grpc

from tandem.client import RESUME_S, as_tandem_error, generation_input
from tandem.errors import TandemError
from tandem.pb.v1 import generation_pb2 as pb
from tandem.pb.v1 import generation_pb2_grpc, model_pb2, model_pb2_grpc
from tandem.progress import StreamProgress
from tandem.rpc import blocking_channel
from tandem.rpc_auth import bearer
from tandem.sampling import SamplingParams
from tandem.speculation import SpeculationParams


class SyncTandemClient:
    """One connection to a Tandem server at `address` (host:port). Use it as a context; threads may share it.

    `token` and `credentials` are those of `tandem.client.TandemClient`.
    """

    def __init__(
        self, address: str, *, token: str | None = None, credentials: grpc.ChannelCredentials | None = None
    ) -> None:
        self.address = address
        self._metadata = bearer(token)
        self._channel = blocking_channel(address, credentials, retries=True)
        self._generation: Any = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._models: Any = model_pb2_grpc.ModelServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def stream(
        self,
        prompt: str | Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        request_id: str = "",
        priority: int = 0,
        speculation: SpeculationParams | None = None,
        timeout_s: float | None = None,
        resume_s: float = RESUME_S,
    ) -> Generator[pb.StreamGenerateResponse]:
        """Events as they happen; a lost stream is taken up again, as `TandemClient.stream` says."""
        message = generation_input(
            prompt, sampling, request_id=request_id, priority=priority, speculation=speculation
        )
        progress = StreamProgress(message, timeout_s, resume_s)
        while True:
            try:
                with closing(self._events(progress)) as events:
                    for event in events:
                        if (new := progress.take(event)) is not None:
                            yield new
                return
            except TandemError as error:
                if progress.has_ended:
                    return
                wait_s = progress.wait_after(error)
            time.sleep(wait_s)

    def generate(
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
        response = self._call(self._generation.Generate, pb.GenerateRequest(input=message), timeout_s)
        assert isinstance(response, pb.GenerateResponse)
        return response

    def cancel(self, request_id: str) -> None:
        """End a running request. Raises `NO_SUCH_REQUEST`."""
        self._call(self._generation.CancelGeneration, pb.CancelGenerationRequest(request_id=request_id))

    def models(self) -> list[model_pb2.Model]:
        """What is served."""
        return list(self._call(self._models.ListModels, model_pb2.ListModelsRequest()).models)

    def _events(self, progress: StreamProgress) -> Generator[pb.StreamGenerateResponse]:
        """One call."""
        call = self._generation.StreamGenerate(
            pb.StreamGenerateRequest(input=progress.rest()),
            timeout=progress.time_left_s,
            metadata=self._metadata,
        )
        try:
            yield from call
        except grpc.RpcError as error:
            raise as_tandem_error(error, self.address) from error
        finally:
            call.cancel()

    def _call(self, method: Any, request: Any, timeout_s: float | None = None) -> Any:
        try:
            return method(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise as_tandem_error(error, self.address) from error
