"""The public gRPC services: wire messages to requests, flights to wire messages. No scheduling here."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import grpc

from router.ask import SESSION_HEADER, Ask
from router.dispatch import Dispatcher
from router.flight import Flight
from router.flight_events import Admitted, Completed, FlightEvent
from router.intake import Intake
from router.interleave import interleave
from tandem.errors import Cancelled, NotFound
from tandem.output import FINISH_TO_PB, OutputDelta, set_matched_stop
from tandem.pb.v1 import generation_pb2 as pb
from tandem.pb.v1 import generation_pb2_grpc, model_pb2, model_pb2_grpc
from tandem.request import REQUEST_ID, public_id, scoped_id
from tandem.rpc_auth import TENANT

Context = grpc.aio.ServicerContext[Any, Any]


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):
    """tandem.v1.GenerationService over one dispatcher."""

    def __init__(self, dispatcher: Dispatcher, intake: Intake) -> None:
        self._dispatcher = dispatcher
        self._intake = intake

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:
        flights = await self._start(request.input, context)
        try:
            completions = await asyncio.gather(
                *(_collect(index, flight) for index, flight in enumerate(flights))
            )
        finally:
            for flight in flights:
                flight.leave()
        return pb.GenerateResponse(
            request_id=public_id(flights[0].request.request_id), completions=completions
        )

    async def StreamGenerate(  # type: ignore[override]
        self, request: pb.StreamGenerateRequest, context: Context
    ) -> None:
        """It writes by itself; a generator in each layer would cost every token as much as all the rest."""
        flights = await self._start(request.input, context)
        try:
            positions = [flight.request.num_output_tokens for flight in flights]
            async with aclosing(interleave(flights)) as happenings:
                async for index, event in happenings:
                    await context.write(_event_to_pb(index, event, positions[index], flights[index]))
                    if isinstance(event, OutputDelta):
                        positions[index] += len(event.token_ids)
        finally:
            for flight in flights:
                flight.leave()

    async def CancelGeneration(
        self, request: pb.CancelGenerationRequest, context: Context
    ) -> pb.CancelGenerationResponse:
        if not REQUEST_ID.fullmatch(request.request_id):  # it could name another tenant's
            raise NotFound("NO_SUCH_REQUEST", "not found")
        self._dispatcher.cancel(scoped_id(TENANT.get(), request.request_id), Cancelled())
        return pb.CancelGenerationResponse()

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        return pb.TokenizeResponse(token_ids=await self._intake.tokenize(request.text))

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        return pb.DetokenizeResponse(text=self._intake.detokenize(request.token_ids))

    async def _start(self, message: pb.GenerationInput, context: Context) -> list[Flight]:
        """One flight per completion, or none of them."""
        ask = Ask.from_pb(message, tenant=TENANT.get(), session=_session_of(context))
        requests = await self._intake.requests(ask, context.time_remaining())
        return self._dispatcher.start(requests)


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    """tandem.v1.ModelService for the one served model."""

    def __init__(self, model: model_pb2.Model) -> None:
        self._model = model

    async def ListModels(
        self, request: model_pb2.ListModelsRequest, context: Context
    ) -> model_pb2.ListModelsResponse:
        return model_pb2.ListModelsResponse(models=[self._model])

    async def GetModel(
        self, request: model_pb2.GetModelRequest, context: Context
    ) -> model_pb2.GetModelResponse:
        if request.model != self._model.name:
            raise NotFound("NO_SUCH_MODEL", "not found")
        return model_pb2.GetModelResponse(model=self._model)


def _session_of(context: Context) -> str:
    """What the caller says in its metadata; values that are no text count for nothing."""
    value = dict(context.invocation_metadata() or ()).get(SESSION_HEADER, "")
    return value if isinstance(value, str) else ""


async def _collect(index: int, flight: Flight) -> pb.Completion:
    completion = pb.Completion(index=index)
    async for event in flight:
        if isinstance(event, OutputDelta):
            completion.text += event.text
            completion.token_ids.extend(event.token_ids)
            completion.logprobs.extend(entry.to_pb() for entry in event.logprobs)
        elif isinstance(event, Completed):
            completion.finished.CopyFrom(_finished_to_pb(index, event))
    return completion


def _event_to_pb(index: int, event: FlightEvent, position: int, flight: Flight) -> pb.StreamGenerateResponse:
    if isinstance(event, Admitted):
        return pb.StreamGenerateResponse(admitted=_admitted_to_pb(index, event, flight))
    if isinstance(event, Completed):
        return pb.StreamGenerateResponse(finished=_finished_to_pb(index, event))
    message = pb.StreamGenerateResponse()
    chunk = message.token_chunk  # filled in place: at thousands of tokens a second a copy of each is seen
    chunk.index, chunk.position, chunk.text = index, position, event.text
    chunk.token_ids.extend(event.token_ids)
    if event.logprobs:
        chunk.logprobs.extend(entry.to_pb() for entry in event.logprobs)
    return message


def _admitted_to_pb(index: int, admitted: Admitted, flight: Flight) -> pb.Admitted:
    plan = admitted.plan
    return pb.Admitted(
        request_id=public_id(plan.request_id),
        index=index,
        prefill_worker=plan.prefill.worker_id if plan.prefill else "",
        decode_worker=plan.decode.worker_id,
        reserved_bytes=plan.needs.decode_bytes,
        prompt_tokens=flight.request.num_prompt_tokens,
    )


def _finished_to_pb(index: int, completed: Completed) -> pb.Finished:
    timings = completed.timings
    message = pb.Finished(
        index=index,
        reason=FINISH_TO_PB[completed.delta.finish],
        usage=completed.usage.to_pb(),
        timings=timings.to_pb(),
    )
    set_matched_stop(message, completed.delta.matched_stop)
    return message
