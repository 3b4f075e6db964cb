"""A service whose KV travels in fewer bytes."""

import pytest

from prefill_worker.link_codec import LinkCodec
from tandem.config import ClusterConfig
from tandem.errors import ConfigError
from tandem.fingerprint import model_fingerprint
from tandem.geometry import KV_CODECS
from tests.e2e.harness import ask, complete, config, running, store_of

pytestmark = pytest.mark.e2e

PROMPT = list(range(3, 130)) * 2


@pytest.mark.parametrize("codec", KV_CODECS)
async def test_requests_complete_and_raw_changes_nothing(codec):
    async with running(config(kvstore={"codec": codec})) as cluster:
        result = await complete(cluster, ask(PROMPT, max_tokens=24, ignore_eos=True))
        assert len(result.token_ids) == 24
        async with running() as plain:
            expected = await complete(plain, ask(PROMPT, max_tokens=24, ignore_eos=True))
        assert result.token_ids[0] == expected.token_ids[0], "the first token is the prefill worker's"
        if codec == "raw":
            assert result.token_ids == expected.token_ids


async def test_auto_takes_fewer_bytes_over_a_slow_link_and_says_so(monkeypatch):
    prompt = ask(PROMPT, max_tokens=24, ignore_eos=True)
    async with running() as plain:
        expected = await complete(plain, prompt)
    async with running(config(kvstore={"codec": "auto"})) as cluster:
        counters = store_of(cluster).counters
        assert (await complete(cluster, prompt)).token_ids == expected.token_ids
        assert (counters.sealed, counters.sealed_int4) == (1, 0)
        monkeypatch.setattr(LinkCodec, "bytes_per_s", 1e3)
        assert len((await complete(cluster, prompt)).token_ids) == 24
        assert (counters.sealed, counters.sealed_int4) == (2, 1)


def test_workers_of_different_codecs_do_not_meet():
    codecs = (*KV_CODECS, "auto")
    assert len({model_fingerprint(config(kvstore={"codec": codec})) for codec in codecs}) == len(codecs)


def test_an_unknown_codec_is_refused():
    with pytest.raises(ConfigError, match="unknown codec zip; known: raw, fp16, int8, int4, auto"):
        ClusterConfig.from_dict({"kvstore": {"codec": "zip"}})
