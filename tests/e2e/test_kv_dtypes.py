"""Services whose prefill and decode workers hold KV in dtypes of their own."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from deploy.embedded import EmbeddedService
from tandem.client import TandemClient
from tandem.config import ClusterConfig, SpeculationConfig
from tandem.engine.batch import SequenceRows
from tandem.engine.model_runner import ModelRunner
from tandem.errors import ConfigError
from tandem.fingerprint import model_fingerprint
from tandem.geometry import DTYPE_BYTES
from tandem.kv_dtypes import KvDtypes
from tandem.quantizations import parse_quantization
from tandem.sampling import SamplingParams
from tests.checkpoints import tiny_llama
from tests.e2e.harness import BLOCK_BYTES, BLOCK_SIZE, ask, complete, config, failure, running, store_of

PROMPTS = [list(range(3, 130)) * 2, list(range(70, 10, -1)), [7, 8, 9] * 11]
NUM_TOKENS = 24
PAIRS = [(prefill, decode) for prefill in DTYPE_BYTES for decode in DTYPE_BYTES if prefill != decode]


def held(prefill_dtype: str, decode_dtype: str, **parts) -> ClusterConfig:
    cache = {"prefill_dtype": prefill_dtype, "decode_dtype": decode_dtype}
    return config(cache=cache, **parts)


def asked(prompt):
    return ask(prompt, max_tokens=NUM_TOKENS, ignore_eos=True)


@cache
def alone(dtype: str) -> tuple[list[int], ...]:
    """What the target says by itself over KV of that dtype."""
    return said_by(ModelRunner.load(tiny_llama(), kv_dtype=dtype, num_blocks=32, block_size=BLOCK_SIZE))


def said_by(runner: ModelRunner) -> tuple[list[int], ...]:
    """Token by token."""
    outputs = []
    for prompt in PROMPTS:
        ids, start = list(prompt), 0
        while len(ids) < len(prompt) + NUM_TOKENS:
            rows = SequenceRows(ids[start:], start, range(32))
            start = len(ids)
            ids.append(int(runner.forward(runner.batch([rows]))[-1].argmax()))
        outputs.append(ids[len(prompt) :])
    return tuple(outputs)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
async def test_one_narrower_dtype_on_both_sides_is_exact(dtype):
    """However prompts are cut, and with drafts: rows see the rounded KV of their own forward too."""
    settings = held(dtype, dtype, prefill={"token_budget": 24}, speculation={"draft": "ngram"})
    async with running(settings) as cluster:
        found = [(await complete(cluster, asked(prompt))).token_ids for prompt in PROMPTS]
        assert cluster.prefills[0].worker._model.cache.dtype == getattr(torch, dtype)
        assert cluster.decodes[0].worker._model.cache.dtype == getattr(torch, dtype)
    assert tuple(found) == alone(dtype)


@pytest.mark.parametrize("quantization", ["bf16", "int8-a8"])
async def test_where_activations_are_rounded_kv_is_in_bfloat16(quantization):
    settings = config(model={"quantization": quantization}, prefill={"token_budget": 24})
    weights, bits = parse_quantization(quantization)
    runner = ModelRunner.load(
        tiny_llama(), quantization=weights, activation_bits=bits, num_blocks=32, block_size=BLOCK_SIZE
    )
    async with running(settings) as cluster:
        found = [(await complete(cluster, asked(prompt))).token_ids for prompt in PROMPTS]
        for worker in (cluster.prefills[0].worker, cluster.decodes[0].worker):
            assert worker._model.cache.dtype == runner.cache.dtype == torch.bfloat16
    assert tuple(found) == said_by(runner)


@pytest.mark.parametrize(("prefill", "decode"), PAIRS)
async def test_unlike_sides_serve_and_kv_travels_in_the_narrower(prefill, decode, monkeypatch):
    headers = []
    async with running(held(prefill, decode)) as cluster:
        reserve = store_of(cluster).reserve
        monkeypatch.setattr(
            store_of(cluster),
            "reserve",
            lambda header, *rest: headers.append(header) or reserve(header, *rest),
        )
        for prompt, expected in zip(PROMPTS, alone(prefill), strict=True):
            result = await complete(cluster, asked(prompt))
            assert len(result.token_ids) == NUM_TOKENS
            assert result.token_ids[0] == expected[0], "the first token is the prefill worker's"
    narrow = min((prefill, decode), key=DTYPE_BYTES.__getitem__)
    blocks = [-(-len(prompt) // BLOCK_SIZE) for prompt in PROMPTS]
    assert [header.dtype for header in headers] == [narrow] * len(PROMPTS)
    assert [header.total_bytes for header in headers] == [
        count * BLOCK_BYTES * DTYPE_BYTES[narrow] // 4 for count in blocks
    ]


async def test_admission_fits_each_side_by_its_own_dtype():
    """Pools of as many bytes hold twice the tokens in halves; the store is charged what travels."""
    prompt = list(range(100))
    wide = config(prefill_blocks=8, decode_blocks=8, store_blocks=4)
    half = replace(wide, cache=replace(wide.cache, decode_dtype="float16"))
    async with running(wide) as cluster:
        assert cluster.decodes[0].worker._pool.num_blocks == 8
        found = await failure(complete(cluster, ask(prompt, max_tokens=60)))
        assert found.reason == "NEVER_FITS"
        assert "needs 10 KV blocks; the largest worker has 8" in found.message
    async with running(half) as cluster:
        assert cluster.prefills[0].worker._pool.num_blocks == 8
        assert cluster.decodes[0].worker._pool.num_blocks == 16
        assert len((await complete(cluster, ask(prompt, max_tokens=60, ignore_eos=True))).token_ids) == 60
        found = await failure(complete(cluster, ask([*range(3, 131), 5], max_tokens=60)))
        assert "for its prompt; the largest prefill worker has 8" in found.message


async def test_a_draft_models_kv_is_held_like_the_targets():
    speculation = SpeculationConfig(draft="model", draft_path=tiny_llama(), draft_prefill="prefill_worker")
    async with running(replace(held("float32", "float16"), speculation=speculation)) as cluster:
        result = await complete(cluster, asked(PROMPTS[0]))
        assert len(result.token_ids) == NUM_TOKENS
        assert cluster.decodes[0].worker._restorer._draft_cache.dtype == torch.float16


@pytest.mark.e2e
@pytest.mark.timeout(180)
async def test_processes_with_unlike_dtypes_serve():
    async with (
        EmbeddedService(held("float32", "bfloat16")) as service,
        TandemClient(service.address) as client,
    ):
        sampling = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
        response = await client.generate(PROMPTS[0], sampling)
        assert len(response.completions[0].token_ids) == NUM_TOKENS
        assert response.completions[0].token_ids[0] == alone("float32")[0][0]


def test_the_dtypes_of_both_sides_are_part_of_the_name():
    names = {model_fingerprint(held(*pair)) for pair in [*PAIRS, *((dtype, dtype) for dtype in DTYPE_BYTES)]}
    assert len(names) == len(DTYPE_BYTES) ** 2
    assert model_fingerprint(held("float32", "float32")) == model_fingerprint(config())


@pytest.mark.parametrize(("prefill", "decode"), PAIRS)
def test_the_wire_is_as_narrow_as_the_narrower_side(prefill, decode):
    wire = KvDtypes(prefill, decode).wire
    assert DTYPE_BYTES[wire] == min(DTYPE_BYTES[prefill], DTYPE_BYTES[decode])
    assert wire in (prefill, decode)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache": {"decode_dtype": "int8"}}, "decode_dtype must be one of auto, float32, bfloat16, float16"),
        (
            {"cache": {"decode_dtype": "float16", "keep_blocks": True}},
            "keep_blocks needs one KV dtype, not float32 at prefill and float16 at decode",
        ),
        (
            {"cache": {"prefill_dtype": "bfloat16", "prefix_bytes": 1}, "kvstore": {"publish": "all"}},
            "publish all needs one KV dtype, not bfloat16 at prefill and float32 at decode",
        ),
    ],
)
def test_what_cannot_work_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ClusterConfig.from_dict(settings)
