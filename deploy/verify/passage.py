"""KV on its way through a running service: from its prefill workers into its store, and from there here.

Whatever a call raises leaves as the `TandemError` it means.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc

from deploy.verify.local import Local, Sample
from kvstore.client import GET_KV, KvClient
from kvstore.key import Buffer, KvHandle
from kvstore.reader import ReadCheck
from kvstore.records import ObjectHeader
from prefill_worker.job import PrefillJob
from prefill_worker.link_codec import LinkCodec
from prefill_worker.sender import Format, ObjectSender
from tandem.client import as_tandem_error
from tandem.config import ClusterConfig
from tandem.engine.kv_transfer import import_kv
from tandem.engine.paged_cache import PagedCache
from tandem.errors import DataLoss, Unavailable
from tandem.fingerprint import model_fingerprint
from tandem.geometry import num_blocks
from tandem.output import OutputDelta
from tandem.pb.kv.v1 import kv_pb2
from tandem.pb.worker.v1 import worker_pb2 as pb
from tandem.pb.worker.v1 import worker_pb2_grpc
from tandem.sampling import SamplingParams
from tandem.work import Work

TIMEOUT_S = 120.0
HOLDER = "verify"
FLIPS = 64  # bits flipped one at a time in each message


class Passage:
    """One service's store, as a decode worker of this build would use it."""

    def __init__(self, config: ClusterConfig, router: grpc.aio.Channel) -> None:
        self._config = config
        self._router = router
        self._client = KvClient(router, config.kvstore)
        self._fingerprint = model_fingerprint(config)

    def work(self, sample: Sample, num_output: int) -> Work:
        """A request of our own that decodes greedily."""
        sampling = SamplingParams(max_tokens=num_output, seed=0, ignore_eos=True, logprobs=0)
        return Work(
            request_id=f"verify-{secrets.token_hex(8)}",
            epoch=1,
            token_ids=sample.prompt,
            num_prompt_tokens=len(sample.prompt),
            sampling=sampling,
            deadline_s=time.monotonic() + TIMEOUT_S,
            fingerprint=self._fingerprint,
        )

    async def prefill(self, worker: grpc.aio.Channel, work: Work) -> tuple[OutputDelta, KvHandle] | None:
        """The first token and where the KV is; None if this is no prefill worker."""
        stub: Any = worker_pb2_grpc.PrefillServiceStub(worker)
        first = handle = None
        try:
            async for event in stub.Prefill(pb.PrefillRequest(work=work.to_pb()), timeout=TIMEOUT_S):
                if event.HasField("first_token"):
                    first = OutputDelta.from_pb(event.first_token)
                elif event.HasField("kv_sealed"):
                    handle = KvHandle.from_pb(event.kv_sealed.handle)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                return None
            raise as_tandem_error(error, "a prefill worker") from error
        if first is None or handle is None:
            raise Unavailable("NO_PREFILL", "the prefill worker did not finish; is it shutting down?")
        return first, handle

    async def decode(self, worker: grpc.aio.Channel, work: Work, handle: KvHandle) -> list[OutputDelta]:
        """What a decode worker makes of the KV, which it gives up."""
        stub: Any = worker_pb2_grpc.DecodeServiceStub(worker)
        hung_up = asyncio.Event()

        async def orders() -> AsyncIterator[pb.DecodeRequest]:
            yield pb.DecodeRequest(open=pb.OpenSession(router_id=HOLDER))
            yield pb.DecodeRequest(start=pb.StartDecode(work=work.to_pb(), handle=handle.to_pb()))
            await hung_up.wait()

        deltas: list[OutputDelta] = []
        try:
            async for response in stub.Decode(orders(), timeout=TIMEOUT_S):
                for event in response.events:
                    if event.HasField("failed"):
                        raise Unavailable(event.failed.reason, event.failed.message)
                    if event.HasField("output"):
                        deltas.append(OutputDelta.from_pb(event.output))
                if deltas and deltas[-1].finish is not None:
                    return deltas
        except grpc.aio.AioRpcError as error:
            raise as_tandem_error(error, "a decode worker") from error
        finally:
            hung_up.set()
        raise Unavailable("NO_DECODE", "the decode worker did not finish; is it shutting down?")

    async def send(self, local: Local, number: int, work: Work, is_shuffled: bool) -> KvHandle:
        """Store the KV of an area raw as a prefill worker does, perhaps with its blocks out of order."""
        blocks = [*local.area(number)[: num_blocks(len(work.token_ids), local.cache.block_size)]]
        if is_shuffled:
            blocks = [*blocks[1:-1], blocks[0], *blocks[-1:]]  # the last one may be partly filled
        config = self._config
        form = Format(
            dtype=config.kv_dtypes.prefill,
            fingerprint=self._fingerprint,
            chunk_bytes=config.kvstore.chunk_bytes,
            codec=LinkCodec.of("raw", local.cache, config.kv_dtypes.prefill),
        )
        job = PrefillJob(work, lambda event: None)
        async with ObjectSender(self._client, form, job, local.cache, blocks) as sender:
            await sender.send(len(blocks))
            return await sender.seal()

    async def place(self, handle: KvHandle, cache: PagedCache, area: Sequence[int]) -> None:
        """Fetch, check and place KV in blocks of a cache of our own, as a decode worker does."""
        headers: list[ObjectHeader] = []
        async with aclosing(self._client.get(handle, HOLDER, on_header=headers.append)) as chunks:
            async for chunk, payload in chunks:
                blocks = area[chunk.block_start : chunk.block_start + chunk.num_blocks]
                layers = chunk.layer_start, chunk.num_layers
                import_kv(cache, blocks, payload, *layers, headers[0].codec, headers[0].dtype)

    async def flip_bits(self, handle: KvHandle) -> tuple[int, int]:
        """Read an object over and over with one bit wrong each time: how often that was noticed, of how many
        times."""
        get: Any = self._router.unary_stream(GET_KV, kv_pb2.GetKvRequest.SerializeToString)
        # Another holder than of `place`, whose lease may be given back only now.
        request = kv_pb2.GetKvRequest(handle=handle.to_pb(), holder=f"{HOLDER}/bits")
        messages = [message async for message in get(request, timeout=TIMEOUT_S)]
        assert not _is_refused(handle, messages), "what was sent is sound"
        noticed, draw = 0, random.Random(0)
        for place, message in enumerate(messages):
            for _ in range(FLIPS):
                damaged = bytearray(message)
                damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
                noticed += _is_refused(handle, [*messages[:place], damaged, *messages[place + 1 :]])
        return noticed, FLIPS * len(messages)

    @asynccontextmanager
    async def held(self, handle: KvHandle) -> AsyncIterator[KvHandle]:
        """Give the stored KV up at the end."""
        try:
            yield handle
        finally:
            for each in handle.objects:
                await self._client.release(each)


def _is_refused(handle: KvHandle, messages: Sequence[Buffer]) -> bool:
    """Whether a reader of these messages would say KV_CORRUPT."""
    check = ReadCheck(handle)
    try:
        for message in messages:
            check.accept(message)
        check.finish()
    except DataLoss:
        return True
    return False
