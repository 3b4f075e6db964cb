"""The paged, packed, chunked forward against transformers' own eager one, per architecture."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tandem.engine.batch import SequenceRows
from tandem.engine.model_runner import ModelRunner
from tandem.errors import ConfigError
from tests.engine.conftest import ARCHITECTURES, ONLY_TRANSFORMERS

TOLERANCE = 1e-4  # absolute, fp32; measured about 1e-6
PROMPT = torch.randint(3, 160, (90,), generator=torch.Generator().manual_seed(1)).tolist()
TABLE = [9, 4, 31, 2, 17, 50, 8]


PAIRS = [(name, "transformers") for name in sorted(ARCHITECTURES)]
PAIRS += [
    (name, own)
    for own in ("lean", "native")
    for name in sorted(ARCHITECTURES.keys() - set(ONLY_TRANSFORMERS))
]


@pytest.fixture(params=PAIRS, ids="-".join)
def pair(request, saved_model, make_runner):
    name, implementation = request.param
    model, _ = saved_model(name)
    return model, make_runner(name, implementation=implementation)


def eager_logits(model, token_ids):
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0].float()


def forward(runner, *sequences):
    return runner.forward(runner.batch([SequenceRows(*s) for s in sequences]))


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max().item()
    assert error <= TOLERANCE, error


def test_whole_prompt(pair):
    model, runner = pair
    assert_close(forward(runner, (PROMPT, 0, TABLE, 90)), eager_logits(model, PROMPT))


def test_chunked_prompt(pair):
    model, runner = pair
    assert forward(runner, (PROMPT[:37], 0, TABLE, 0)).shape == (0, 160)
    assert forward(runner, (PROMPT[37:70], 37, TABLE, 0)).shape == (0, 160)
    assert_close(forward(runner, (PROMPT[70:], 70, TABLE, 1)), eager_logits(model, PROMPT)[-1:])


def test_token_by_token(pair):
    model, runner = pair
    forward(runner, (PROMPT[:60], 0, TABLE))
    steps = [forward(runner, (PROMPT[i : i + 1], i, TABLE)) for i in range(60, 90)]
    assert_close(torch.cat(steps), eager_logits(model, PROMPT)[60:])


def test_verify_three_rows(pair):
    model, runner = pair
    forward(runner, (PROMPT[:60], 0, TABLE))
    assert_close(forward(runner, (PROMPT[60:63], 60, TABLE, 3)), eager_logits(model, PROMPT[:63])[60:])


def test_mixed_ragged_batch(pair):
    """Fresh prompts of unlike lengths, a chunk, a decode row and verify rows in one forward."""
    model, runner = pair
    forward(runner, (PROMPT[:40], 0, TABLE, 0), (PROMPT[5:60], 0, [20, 21, 22, 23], 0))
    forward(runner, (PROMPT[2:40], 0, [24, 25, 26], 0))
    actual = forward(
        runner,
        (PROMPT[10:80], 0, [40, 41, 42, 43, 44]),
        (PROMPT[40:90], 40, TABLE),
        (PROMPT[60:61], 55, [20, 21, 22, 23]),
        (PROMPT[30:38], 0, [45]),
        (PROMPT[40:43], 38, [24, 25, 26], 3),
        (PROMPT[12:76], 0, [46, 47, 48, 49]),
    )
    expected = [
        eager_logits(model, PROMPT[10:80])[-1:],
        eager_logits(model, PROMPT)[-1:],
        eager_logits(model, PROMPT[5:61])[-1:],
        eager_logits(model, PROMPT[30:38])[-1:],
        eager_logits(model, PROMPT[2:43])[-3:],
        eager_logits(model, PROMPT[12:76])[-1:],
    ]
    assert_close(actual, torch.cat(expected))


def test_report_vocabulary_and_warm_up(make_runner):
    runner = make_runner("llama3")
    runner.warm_up()
    assert runner.vocab_size == 160
    assert runner.eos_token_ids == {2}
    assert {choice.kernel for choice in runner.linear_report().values()} == {"native-fp32"}
    assert "lm_head" in runner.linear_report()


def write_checkpoint(path, **changes):
    config = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": 8} | changes))
    save_file({"x": torch.zeros(1)}, path / "model.safetensors")


def load(path):
    return ModelRunner.load(path, num_blocks=4, block_size=16)


def test_refuses_pickled_weights(tmp_path):
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        load(tmp_path)


def test_refuses_code_from_the_checkpoint(tmp_path):
    write_checkpoint(tmp_path, auto_map={"AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(ConfigError, match="auto_map"):
        load(tmp_path)


def test_refuses_rope_that_depends_on_other_sequences(tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    write_checkpoint(tmp_path, rope_parameters=rope)
    with pytest.raises(ConfigError, match="dynamic"):
        load(tmp_path)


def test_refuses_unknown_layer_types_and_missing_config(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json"):
        load(tmp_path)
    write_checkpoint(tmp_path, layer_types=["chunked_attention"])
    with pytest.raises(ConfigError, match="chunked_attention"):
        load(tmp_path)


def test_refuses_an_encoder_decoder(tmp_path):
    write_checkpoint(tmp_path, model_type="t5", is_encoder_decoder=True)
    with pytest.raises(ConfigError, match="decoder-only"):
        load(tmp_path)
