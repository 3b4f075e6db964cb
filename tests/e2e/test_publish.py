"""What a decode worker publishes of finished requests: the next turn starts warm and says the same."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import aclosing, asynccontextmanager
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from decode_worker import publisher
from kvstore.client import KvClient
from kvstore.pieces import PieceFormat, Pieces
from tandem.config import ClusterConfig
from tandem.errors import Unavailable
from tandem.fingerprint import model_fingerprint
from tandem.geometry import ModelGeometry
from tandem.rpc import channel
from tests.checkpoints import save_llama, tiny_llama
from tests.e2e.harness import (
    BLOCK_BYTES,
    MIB,
    Result,
    ask,
    complete,
    config,
    crash,
    drain,
    gated_puts_of,
    open_stream,
    quiesce,
    read_tokens,
    running,
    slow_steps,
    until,
)
from tests.web import get, post

pytestmark = pytest.mark.asyncio(loop_scope="module")

PIECE = 32  # tokens
PROMPT = tuple((7 * i + i * i) % 251 for i in range(70))
NEXT = tuple(range(40, 60))  # what is said after an answer
DRAFTS = ("none", "ngram", "twin", "stranger")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A draft that knows nothing of the target: nearly all guesses are rejected."""
    return save_llama(tmp_path_factory.mktemp("draft") / "stranger", seed=5)


def publishing(draft="none", stranger=None, publish="all", **parts) -> ClusterConfig:
    kvstore = {"prefix_tokens": PIECE, "publish": publish}
    if draft in ("twin", "stranger"):
        path = tiny_llama() if draft == "twin" else stranger
        speculation = {"draft": "model", "draft_path": path, "num_assistant_tokens": 4}
    else:
        speculation = {"draft": draft, "num_assistant_tokens": 4}
    return config(cache={"prefix_bytes": 4 * MIB}, kvstore=kvstore, speculation=speculation, **parts)


def stats_of(cluster):
    return cluster.decodes[0].worker._publisher._reuse.pieces.report


async def say(cluster, prompt, max_tokens, **sampling):
    """The completion, and how many tokens of the prompt were cached; returns when all is published."""
    message = ask(prompt, max_tokens=max_tokens, **{"ignore_eos": True, "logprobs": 1} | sampling)
    result = await complete(cluster, message)
    await quiesce(cluster, within_s=20)
    return result, result.finished.usage.cached


async def two_turns(cluster, max_tokens, **sampling):
    """A conversation of its own for each length."""
    prompt = (max_tokens, *PROMPT[1:])
    first, _ = await say(cluster, prompt, max_tokens, **sampling)
    second, cached = await say(cluster, (*prompt, *first.token_ids, *NEXT), 8, **sampling)
    return first, second, cached


def whole_pieces(num_tokens: int) -> int:
    return num_tokens // PIECE * PIECE


@asynccontextmanager
async def pieces_of(cluster):
    """The pieces in the cluster's store, as a worker sees them."""
    settings = cluster.config
    form = PieceFormat.of(settings, ModelGeometry.from_path(settings.model.path), model_fingerprint(settings))
    async with channel(cluster.router.internal_address) as link:
        client = KvClient(link)
        yield client, Pieces(client, form)


async def stored_bytes(cluster, token_ids) -> list[bytes]:
    """The KV of each cached piece that these tokens begin with."""
    found = []
    async with pieces_of(cluster) as (client, pieces):
        _, handles = await pieces.look_up("", token_ids)
        for handle in handles:
            async with aclosing(client.get(handle, "test")) as chunks:
                found.append(b"".join([bytes(payload) async for _, payload in chunks]))
    return found


@pytest.mark.parametrize("draft", DRAFTS)
async def test_the_next_turn_starts_warm_and_says_the_same(draft, stranger, cluster):
    """Answers that end before, on and behind a piece's border, whose last token's KV does not exist."""
    async with running(publishing(draft, stranger)) as warm:
        for max_tokens in (26, 27, 28, 58, 59):
            first, second, cached = await two_turns(warm, max_tokens)
            assert cached == whole_pieces(len(PROMPT) + max_tokens - 1)
            cold_first, cold_second, _ = await two_turns(cluster, max_tokens)
            assert first.token_ids == cold_first.token_ids
            assert second.token_ids == cold_second.token_ids
            assert second.logprobs == cold_second.logprobs
        # Behind each prompt's two: none, one, one, one and two; one that prefill publishes just now, too.
        assert stats_of(warm).num_published >= 5
        assert stats_of(warm).num_given_up == stats_of(warm).num_failures == 0


@pytest.mark.parametrize("draft", DRAFTS)
async def test_published_kv_has_the_bits_that_prefill_computes(draft, stranger):
    async with running(publishing(draft, stranger)) as warm:
        first, _ = await say(warm, PROMPT, 91)
        tokens = (*PROMPT, *first.token_ids)
        stored = await stored_bytes(warm, tokens)
    async with running(publishing(draft, stranger, publish="prompt")) as cold:
        await say(cold, tokens, 2)
        assert await stored_bytes(cold, tokens) == stored
    assert len(stored) == whole_pieces(len(tokens) - 1) // PIECE == 5


async def test_prompts_that_were_computed_where_they_are_decoded_are_published_whole():
    async with running(publishing(router={"disaggregate": "never"})) as local:
        first, _ = await say(local, PROMPT, 91)
        tokens = (*PROMPT, *first.token_ids)
        stored = await stored_bytes(local, tokens)
        assert stats_of(local).num_published == len(stored) == 5
    async with running(publishing(publish="prompt")) as split:
        await say(split, tokens, 2)
        assert await stored_bytes(split, tokens) == stored


async def prompt_whose_answer_has_a_mark(cluster, at: int) -> tuple[tuple[int, ...], int]:
    """A prompt, and the token at that place of its answer, which does not come earlier."""
    for start in range(50):
        prompt = (start, *PROMPT[1:])
        tokens = (await say(cluster, prompt, at + 1))[0].token_ids
        if tokens[-1] not in tokens[:-1]:
            return prompt, tokens[-1]
    raise AssertionError("every answer repeats itself")


async def test_tokens_behind_a_stop_are_not_published(cluster):
    """With a draft that is right, the last step computes more than the answer keeps: past the border."""
    at = 3 * PIECE - len(PROMPT) - 1
    prompt, mark = await prompt_whose_answer_has_a_mark(cluster, at)
    async with running(publishing("twin")) as warm:
        first, _ = await say(warm, prompt, 60, stop_token_ids=[mark])
        assert len(first.token_ids) == at + 1
        turn = (*prompt, *first.token_ids)
        assert len(turn) == 3 * PIECE
        assert len(await stored_bytes(warm, turn)) == 2
        longer, _ = await say(warm, turn, 60)
        assert len(await stored_bytes(warm, (*turn, *longer.token_ids))) == (len(turn) + 59) // PIECE
        assert longer.token_ids == (await say(cluster, turn, 60))[0].token_ids


async def test_sampled_answers_are_published_too(cluster):
    sampling = {"temperature": 1.0, "seed": 11}
    async with running(publishing("ngram")) as warm:
        first, second, cached = await two_turns(warm, 40, **sampling)
        assert cached == whole_pieces(len(PROMPT) + 39)
        cold_first, cold_second, _ = await two_turns(cluster, 40, **sampling)
        assert (first.token_ids, second.token_ids) == (cold_first.token_ids, cold_second.token_ids)


async def test_by_default_only_prompts_are_published():
    async with running(publishing(publish="prompt")) as warm:
        _, _, cached = await two_turns(warm, 60)
        assert cached == whole_pieces(len(PROMPT))
        assert warm.decodes[0].worker._publisher._reuse.pieces is None


async def test_cancelled_requests_publish_nothing():
    async with running(publishing()) as warm:
        with slow_steps(warm.decodes[0]):
            call = open_stream(warm, ask(PROMPT, max_tokens=200, ignore_eos=True))
            await read_tokens(call, Result(), 40)
            call.cancel()
        await quiesce(warm)
        assert stats_of(warm).num_published == 0


def client_of(cluster):
    return cluster.decodes[0].worker._publisher._reuse.pieces._client


async def test_a_slow_store_delays_nobody_and_lets_go_of_memory_that_is_needed():
    """Room for one request at a time: the second comes while the first one's blocks are still held."""
    one = -(-(len(PROMPT) + 60) // 16)
    async with running(publishing(decode_blocks=one)) as warm:
        with gated_puts_of(client_of(warm)) as gate:
            await complete(warm, ask(PROMPT, max_tokens=60, ignore_eos=True))
            await until(lambda: gate.num_arrived)
            assert warm.decodes[0].worker.audit().owned == one
            await complete(warm, ask(PROMPT, max_tokens=60, ignore_eos=True))
            assert stats_of(warm).num_given_up == 1
            assert stats_of(warm).num_published == 0
        await quiesce(warm)
        assert stats_of(warm).num_published == 2, "the second one's blocks were needed by nobody"


async def test_what_takes_too_long_or_is_too_much_is_given_up(monkeypatch):
    monkeypatch.setattr(publisher, "PUBLISH_S", 0.3)
    monkeypatch.setattr(publisher, "MAX_HELD", 3)
    async with running(publishing()) as warm:
        with gated_puts_of(client_of(warm)):
            prompts = [(start, *PROMPT[1:]) for start in range(5)]
            sent = (complete(warm, ask(prompt, max_tokens=60, ignore_eos=True)) for prompt in prompts)
            results = await asyncio.gather(*sent)
            assert all(len(result.token_ids) == 60 for result in results)
            await quiesce(warm)
            stats = stats_of(warm)
            assert (stats.num_given_up, stats.num_published) == (5, 0)


async def test_a_store_that_takes_nothing_costs_nothing_but_the_next_turns_time(cluster):
    async with running(publishing()) as warm:
        client = client_of(warm)
        find = client.find

        async def refuse(*args, **kwargs):
            raise Unavailable("STORE_DOWN", "KV store is unavailable")

        client.find = refuse
        first, second, cached = await two_turns(warm, 60)
        client.find = find
        assert (first.token_ids, second.token_ids) == tuple(
            result.token_ids for result in (await two_turns(cluster, 60))[:2]
        )
        assert cached == whole_pieces(len(PROMPT))
        assert stats_of(warm).num_failures == 2


async def test_a_request_that_lost_its_worker_starts_from_what_was_published(cluster):
    prompt = PROMPT[:64]
    async with running(publishing(), num_decode=2) as warm:
        with slow_steps(warm.decodes[0]), slow_steps(warm.decodes[1]):
            call = open_stream(warm, ask(prompt, max_tokens=60, ignore_eos=True))
            result = await read_tokens(call, Result(), 40)
            [busy] = [server for server in warm.decodes if server.worker.num_running]
            restored = warm.prefills[0].worker._prefixes.report
            assert restored.num_tokens == 0
            await crash(busy)
            await drain(call, result)
        assert restored.num_tokens == len(prompt)
        assert result.token_ids == (await say(cluster, prompt, 60))[0].token_ids
        await busy.worker.stop()


async def test_what_reuse_brought_is_counted_over_http():
    """Per request, and per worker: hits, bytes, and time by the measured cost of a prompt token."""
    async with running(publishing(router={"http_port": 0, "heartbeat_s": 0.05})) as warm:
        prefill, body = warm.prefills[0].worker, {"max_tokens": 59, "ignore_eos": True, "temperature": 0}
        await post(warm.http_address, "/v1/completions", {"prompt": list(PROMPT), **body})
        await quiesce(warm)
        prefill._runner.cost = SimpleNamespace(
            per_token_s=0.01, observe=lambda *forward: None, tokens_within=lambda *bounds: 1024
        )
        turn = [*PROMPT, *(await say(warm, PROMPT, 59))[0].token_ids, *NEXT]
        reply = await post(warm.http_address, "/v1/completions", {"prompt": turn, **body})
        details = reply.json()["usage"]["prompt_tokens_details"]
        assert (details["cached_tokens"], details["cached_bytes"]) == (128, 8 * BLOCK_BYTES)
        assert 0 < details["saved_ms"] < 10 * 128
        metrics = await settled_metrics(warm, prompts=3)

    first, second = "prefill-0", "decode-0"
    assert metrics["tandem_prefix_prompts_total", first] == 3
    assert metrics["tandem_prefix_hits_total", first] == 2
    assert metrics["tandem_prefix_restored_tokens_total", first] == 64 + 128
    assert metrics["tandem_prefix_restored_bytes_total", first] == 12 * BLOCK_BYTES
    restore_s = metrics["tandem_prefix_restore_seconds_total", first]
    assert metrics["tandem_prefix_saved_seconds", first] == pytest.approx(0.01 * (64 + 128) - restore_s)
    assert metrics["tandem_prefix_published_pieces_total", first] == 2
    assert metrics["tandem_prefix_published_pieces_total", second] >= 4
    for name in ("given_up", "failures"):
        assert metrics[f"tandem_prefix_{name}_total", first] == 0


async def settled_metrics(cluster, prompts):
    """(name, worker) → value, once the workers have said what they did last."""
    for _ in range(100):
        await quiesce(cluster)
        text = (await get(cluster.http_address, "/metrics")).body.decode()
        families = text_string_to_metric_families(text)
        samples = (sample for family in families for sample in family.samples)
        found = Counter({(sample.name, sample.labels.get("worker")): sample.value for sample in samples})
        published = found["tandem_prefix_published_pieces_total", "decode-0"]
        if found["tandem_prefix_prompts_total", "prefill-0"] == prompts and published >= 4:
            return found
        await asyncio.sleep(0.05)
    raise AssertionError(f"the workers' heartbeats do not tell: {found}")
