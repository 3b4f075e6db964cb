"""Both ways to a prefill worker, over one stream and call by call, against a real worker: the same ends."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from prefill_worker.service import PrefillServicer
from router.prefill_link import PrefillCalls, PrefillLink
from tandem import rpc
from tandem.errors import InvalidRequest, TandemError, Unavailable
from tandem.internal import LOOPBACK_ONLY
from tandem.output import OutputDelta
from tandem.pb.worker.v1 import worker_pb2 as pb
from tandem.pb.worker.v1 import worker_pb2_grpc
from tests.prefill_worker.rig import Rig, prefilling
from tests.router.workers import prefill_worker
from tests.serving import FINGERPRINT, PATIENCE_S, Gate, greedy, make_work, prompt_of, until

WAYS = [PrefillLink, PrefillCalls]


@dataclass
class Linked:
    rig: Rig
    server: object
    link: PrefillLink | PrefillCalls
    losses: list[str] = field(default_factory=list)

    async def prefill(self, work) -> list:
        news: list = []
        await self.link.prefill(work, news.append)
        return [item for item in news if not isinstance(item, pb.KvOpened)]


@asynccontextmanager
async def linked(way, **options):
    async with prefilling(**options) as rig:
        server = rpc.server(public=False)
        worker_pb2_grpc.add_PrefillServiceServicer_to_server(PrefillServicer(rig.worker, FINGERPRINT), server)
        port = rpc.bind(server, "127.0.0.1", 0)
        await server.start()
        losses: list[str] = []
        link = way(prefill_worker(address=f"127.0.0.1:{port}"), LOOPBACK_ONLY, lambda: losses.append("lost"))
        try:
            yield Linked(rig, server, link, losses)
        finally:
            await link.close()
            await server.stop(None)


@pytest.mark.parametrize("way", WAYS)
async def test_many_prompts_at_once(way):
    async with linked(way) as to:
        prompts = [prompt_of(20 + index, start=index) for index in range(6)]
        results = await asyncio.gather(
            *(to.prefill(make_work(f"r{index}", prompt)) for index, prompt in enumerate(prompts))
        )
        for prompt, (first, sealed) in zip(prompts, results, strict=True):
            assert first.token_ids == greedy(prompt, 1)
            assert sealed.handle.num_tokens == len(prompt)


@pytest.mark.parametrize("way", WAYS)
async def test_a_token_that_is_the_last_ends_it(way):
    async with linked(way) as to:
        [only] = await to.prefill(make_work(max_tokens=1))
        assert isinstance(only, OutputDelta)
        assert only.finish is not None


@pytest.mark.parametrize("way", WAYS)
async def test_what_the_worker_raised(way):
    async with linked(way, num_blocks=2) as to:
        with pytest.raises(InvalidRequest) as caught:
            await to.prefill(make_work(token_ids=prompt_of(33)))
        assert caught.value.reason == "NEVER_FITS"
        assert caught.value.message == "prompt needs 3 KV blocks; the worker has 2"
        assert not to.losses


@pytest.mark.parametrize("way", WAYS)
async def test_a_lost_worker_fails_all_its_prompts(way):
    gate = Gate()
    async with linked(way, forward=gate) as to:
        prompts = [asyncio.ensure_future(to.prefill(make_work(f"r{index}"))) for index in range(5)]
        await until(lambda: gate.entered == 1)
        await to.server.stop(None)
        for failed in await asyncio.wait_for(asyncio.gather(*prompts, return_exceptions=True), PATIENCE_S):
            assert isinstance(failed, Unavailable)
            assert failed.reason == "NO_PREFILL"
        assert to.losses
        with pytest.raises(Unavailable):
            await to.prefill(make_work("after"))


@pytest.mark.parametrize("way", WAYS)
async def test_a_link_that_is_closed_fails_its_prompts(way):
    """The worker was declared lost: whoever waits for it is told, and is not cancelled."""
    gate = Gate()
    async with linked(way, forward=gate) as to:
        prompt = asyncio.ensure_future(to.prefill(make_work()))
        await until(lambda: gate.entered == 1)
        await to.link.close()
        with pytest.raises(Unavailable) as caught:
            await asyncio.wait_for(prompt, PATIENCE_S)
        assert caught.value.reason == "NO_PREFILL"


@pytest.mark.parametrize("way", WAYS)
async def test_a_cancelled_prompt_leaves_nothing(way):
    gate = Gate()
    async with linked(way, forward=gate) as to:
        prompt = asyncio.ensure_future(to.prefill(make_work()))
        other = asyncio.ensure_future(to.prefill(make_work("other", max_tokens=1)))
        await until(lambda: gate.entered == 1)
        prompt.cancel()
        await asyncio.wait({prompt})
        assert prompt.cancelled()
        await asyncio.sleep(0.05)
        gate.open()
        [only] = await other
        assert only.finish is not None
        await to.rig.running.freed()


@pytest.mark.parametrize("way", WAYS)
async def test_whoever_cannot_take_the_news_gives_the_prompt_up(way):
    """A client that reads nothing ends its own request, no other."""

    def refuse(news):
        raise TandemError("CLIENT_TOO_SLOW", "client too slow")

    async with linked(way) as to:
        with pytest.raises(TandemError) as caught:
            await to.link.prefill(make_work(), refuse)
        assert caught.value.reason == "CLIENT_TOO_SLOW"
        assert len(await to.prefill(make_work("other"))) == 2
        assert not to.losses
        await until(lambda: len(to.rig.store.audit().owners) == 1)


async def test_news_of_a_later_version_and_of_nobody_are_passed_over():
    """Of a worker that says more than this router knows."""

    class Later(worker_pb2_grpc.PrefillServiceServicer):
        async def StreamPrefill(self, request_iterator, context):
            async for request in request_iterator:
                name = {"request_id": request.start.request_id, "epoch": request.start.epoch}
                for what in (
                    {},
                    {"progress": pb.PrefillResponse()},
                    {"progress": pb.PrefillResponse(kv_sealed=pb.KvSealed(send_ns=7))},
                ):
                    event = pb.PromptEvent(**name, **what)
                    yield pb.StreamPrefillResponse(events=[pb.PromptEvent(request_id="nobody"), event])

    server = rpc.server(public=False)
    worker_pb2_grpc.add_PrefillServiceServicer_to_server(Later(), server)
    port = rpc.bind(server, "127.0.0.1", 0)
    await server.start()
    link = PrefillLink(prefill_worker(address=f"127.0.0.1:{port}"), LOOPBACK_ONLY, lambda: None)
    news: list = []
    await asyncio.wait_for(link.prefill(make_work(), news.append), PATIENCE_S)
    assert [item.send_ns for item in news] == [7]
    assert link._stream.num_stale_events >= 3
    await link.close()
    await server.stop(None)
