"""Everything between a worker's orders and its tokens, with the model on a device that is not the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from decode_worker.decoder import PlainDecoder
from decode_worker.drafts.model import ModelDraft
from decode_worker.drafts.shared import SharedDraft
from tandem.config import ClusterConfig, ModelConfig
from tandem.engine.kv_transfer import export_kv, import_kv
from tandem.engine.loading import load_engine
from tandem.engine.model_runner import ModelRunner
from tandem.errors import ConfigError
from tandem.speculation import SpeculationPolicy
from tests.checkpoints import save_llama, tiny_llama
from tests.decode_worker.test_speculative import (
    BLOCK_SIZE,
    EVERYTHING,
    GREEDY,
    NUM_BLOCKS,
    PENALIZED,
    SAMPLED,
    plain,
    run,
    sequences,
    speculative,
)
from tests.engine.pretend_device import DEVICE, pretended

PARAMS = pytest.mark.parametrize(
    "params", [GREEDY, SAMPLED, PENALIZED, EVERYTHING], ids=["greedy", "sampled", "pen", "all"]
)


@pytest.fixture
def there() -> Iterator[ModelRunner]:
    with pretended():
        yield on_device(tiny_llama())


@pytest.fixture(scope="module")
def here() -> ModelRunner:
    return ModelRunner.load(
        tiny_llama(), num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, implementation="transformers"
    )


def on_device(path, num_blocks: int = NUM_BLOCKS) -> ModelRunner:
    return ModelRunner.load(path, num_blocks=num_blocks, block_size=BLOCK_SIZE, device=DEVICE)


@PARAMS
def test_tokens_are_those_of_the_cpu(here, there, params) -> None:
    assert (there.implementation, there.device) == ("transformers", DEVICE)
    assert plain(there, params) == plain(here, params)


@PARAMS
@pytest.mark.parametrize("policy", [SpeculationPolicy.EXACT, SpeculationPolicy.AUTO])
def test_drafts_change_no_token(here, there, tmp_path, params, policy) -> None:
    if policy is SpeculationPolicy.AUTO and params is not GREEDY:
        decoder = speculative(there, ModelDraft(on_device(tiny_llama())), 4)
        run(decoder, sequences(there, params, policy))
        assert decoder.stats.num_accepted == decoder.stats.num_drafted > 0  # the same distributions
        return
    expected = plain(here, params)
    other = save_llama(tmp_path / "draft", seed=5)
    for draft in (ModelDraft(on_device(other)), SharedDraft(on_device(other, 1).over(there.cache))):
        decoder = speculative(there, draft, 4)
        assert run(decoder, sequences(there, params, policy)) == expected
        assert decoder.stats.num_rollbacks > 0


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_kv_crosses_between_a_device_and_the_cpu(here, there, codec) -> None:
    """Computed on one, decoded on the other."""
    expected = plain(here, GREEDY)
    for source, target in ((here, there), (there, here)):
        running = sequences(source, GREEDY, SpeculationPolicy.OFF)
        for sequence in running:
            blocks = sequence.blocks[: -(-sequence.num_computed // BLOCK_SIZE)]
            layers = range(source.geometry.num_layers)
            data = export_kv(source.cache, blocks, sequence.num_computed, 0, len(layers), codec)
            import_kv(target.cache, blocks, bytes(data), 0, len(layers), codec)
        found = run(PlainDecoder(target), running)
        assert found == expected or codec != "raw"


def test_a_device_that_is_not_there_is_said() -> None:
    config = ClusterConfig(model=ModelConfig(path=tiny_llama(), device="cuda:7"))
    with pytest.raises(ConfigError, match=r"model device cuda:7: torch .* GPUs here; .* model.device: cpu"):
        load_engine(config, "decode", 1 << 22, 1)
