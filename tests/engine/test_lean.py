"""Which decoder runs and why, what the lean one refuses, and that it leaves transformers alone."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tandem.engine.batch import SequenceRows
from tandem.engine.lean.config import LeanConfig, NotLeanError
from tandem.engine.lean.layer import _silu_and_mul
from tandem.engine.lean.norm import RmsNorm
from tandem.engine.lean.rope import Rope, RopeConfig
from tandem.engine.model_runner import ModelRunner
from tandem.errors import ConfigError
from tests.engine.conftest import ARCHITECTURES, ONLY_TRANSFORMERS

BUNDLED = Path(__file__).parents[2] / "tandem" / "models" / "target"
LOAD_BUNDLED = """
import sys
import tandem.engine.loading
from pathlib import Path
from tandem.engine.model_runner import ModelRunner
runner = ModelRunner.load(Path(sys.argv[1]), num_blocks=8, block_size=16)
runner.warm_up()
assert runner.implementation == "native", runner.implementation_reason
assert "transformers" not in sys.modules
"""


def load(path, **changes):
    return ModelRunner.load(path, num_blocks=8, block_size=16, **changes)


@pytest.fixture
def checkpoint(saved_model, tmp_path):
    """`checkpoint(name)` → a copy of that checkpoint's folder and its tensors, free to be spoiled."""

    def copy(name):
        path = tmp_path / name
        shutil.copytree(saved_model(name)[1], path)
        return path, load_file(path / "model.safetensors")

    return copy


def logits(runner, token_ids=(3, 4, 5, 9)):
    return runner.forward(runner.batch([SequenceRows(token_ids, 0, [3], len(token_ids))]))


def test_loads_without_transformers():
    subprocess.run([sys.executable, "-c", LOAD_BUNDLED, BUNDLED], check=True, timeout=100)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_what_runs_is_visible(make_runner, name):
    runner = make_runner(name)
    known = name not in ONLY_TRANSFORMERS
    assert runner.implementation == ("native" if known else "transformers")
    reason = runner.implementation_reason
    assert "kernels for" in reason if known else "is not in the lean decoder" in reason


def test_asking_for_lean_is_not_silently_refused(saved_model):
    path = saved_model("gemma2")[1]
    with pytest.raises(ConfigError, match="Gemma2ForCausalLM is not in the lean decoder"):
        load(path, implementation="lean")
    with pytest.raises(ConfigError, match="implementation must be one of"):
        load(path, implementation="fast")


def test_other_precisions_run_on_transformers(saved_model):
    runner = load(saved_model("llama2")[1], dtype="bfloat16")
    assert (runner.implementation, runner.implementation_reason) == (
        "transformers",
        "the lean decoder computes in float32 on a CPU",
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"rope_parameters": {"full_attention": {}}}, "between layers"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "part of each head"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"architectures": None}, "no architecture"),
        ({"is_encoder_decoder": True}, "not causal"),
    ],
)
def test_says_what_only_transformers_can_do(changes, reason):
    config = json.loads((BUNDLED / "config.json").read_text())
    with pytest.raises(NotLeanError, match=reason):
        LeanConfig.parse(config | changes)


def test_windows_follow_the_config():
    qwen = {"architectures": ["Qwen2ForCausalLM"], "hidden_size": 8, "intermediate_size": 8, "vocab_size": 9}
    qwen |= {"num_attention_heads": 1, "num_hidden_layers": 3, "sliding_window": 5, "max_window_layers": 1}
    assert LeanConfig.parse(qwen).windows == (None, None, None)
    qwen |= {"use_sliding_window": True}
    assert LeanConfig.parse(qwen).windows == (None, 5, 5)
    types = ["sliding_attention", "full_attention", "full_attention"]
    assert LeanConfig.parse(qwen | {"layer_types": types}).windows == (5, None, None)
    mistral = qwen | {"architectures": ["MistralForCausalLM"]}
    assert LeanConfig.parse(mistral).windows == (5, 5, 5)
    assert LeanConfig.parse(mistral | {"sliding_window": None}).windows == (None, None, None)


def test_names_tensors_that_do_not_fit(checkpoint):
    path, tensors = checkpoint("qwen2")
    file, up = path / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {up: torch.zeros(3, 5)}, file)
    with pytest.raises(ConfigError, match=rf"misshapen tensors: {up} \(F32 \[3, 5\] instead of \[96, 64\]\)"):
        load(path)
    save_file({name: tensor for name, tensor in tensors.items() if name != up}, file)
    with pytest.raises(ConfigError, match=f"lacks tensors: {up}"):
        load(path)
    save_file(tensors | {"model.extra": torch.zeros(1)}, file)
    with pytest.raises(ConfigError, match=r"unexpected tensors: model\.extra"):
        load(path)
    save_file(tensors | {up: tensors[up].to(torch.int8)}, file)
    with pytest.raises(ConfigError, match=rf"{up} \(I8"):
        load(path)
    file.write_bytes(b"not safetensors")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(path)


def test_what_old_checkpoints_carry_is_harmless(checkpoint, make_runner):
    """Rotary frequencies, and the head of a model whose head is its embedding."""
    path, tensors = checkpoint("llama3")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    extra |= {"lm_head.weight": torch.zeros(160, 64)}
    save_file(tensors | extra, path / "model.safetensors")
    assert torch.equal(logits(load(path)), logits(make_runner("llama3")))


def shard(path, tensors):
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    names = sorted(tensors)
    for file, part in zip(files, (names[::2], names[1::2]), strict=True):
        save_file({name: tensors[name] for name in part}, path / file)
    (path / "model.safetensors").unlink()
    return {name: files[index % 2] for index, name in enumerate(names)}


def test_shards(checkpoint, make_runner):
    path, tensors = checkpoint("qwen3")
    weight_map = shard(path, tensors)
    with pytest.raises(ConfigError, match="neither"):
        load(path)
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(logits(load(path)), logits(make_runner("qwen3")))
    index.write_text(json.dumps({"weight_map": weight_map | {"x": "../other.safetensors"}}))
    with pytest.raises(ConfigError, match="no safetensors file of the folder"):
        load(path)
    index.write_text(json.dumps({"weight_map": weight_map | {"x": "model-3.safetensors"}}))
    with pytest.raises(ConfigError, match=r"lacks model-3\.safetensors"):
        load(path)
    index.write_text("[]")
    with pytest.raises(ConfigError, match="is not an index"):
        load(path)


def test_end_of_text_ids(checkpoint):
    path, _ = checkpoint("llama2")
    for file, ids, expected in (
        ("generation_config.json", [7, 9], {7, 9}),
        ("generation_config.json", 5, {5}),
        ("generation_config.json", None, {2}),
        ("config.json", [3], {3}),
        ("config.json", None, set()),
    ):
        content = json.loads((path / file).read_text()) | {"eos_token_id": ids}
        (path / file).write_text(json.dumps(content))
        assert load(path).eos_token_ids == expected
    config = json.loads((path / "config.json").read_text())
    del config["eos_token_id"]
    (path / "config.json").write_text(json.dumps(config))
    assert load(path).eos_token_ids == {2}  # what Llama has if its config does not say


def test_half_precision_storage_loses_nothing(checkpoint, saved_model):
    path, tensors = checkpoint("mistral")
    save_file({name: tensor.half() for name, tensor in tensors.items()}, path / "model.safetensors")
    stored = load(path)
    save_file({name: tensor.half().float() for name, tensor in tensors.items()}, path / "model.safetensors")
    assert torch.equal(logits(stored), logits(load(path)))
    assert {choice.kernel for choice in stored.linear_report().values()} <= {"native-fp16"}


@pytest.mark.parametrize("width", [96, 1003, 20_000])
@pytest.mark.parametrize("threads", [2, 3])
def test_rowwise_operations_keep_their_bits(width, threads):
    """Widths that are no multiple of a vector, more elements than torch leaves to one thread."""
    generator = torch.Generator().manual_seed(width)
    gate_up, weight = torch.randn(64, 2 * width, generator=generator), torch.ones(2 * width)
    operations = [_silu_and_mul, RmsNorm(weight, 1e-5)]
    alone = [torch.cat([run(row[None]) for row in gate_up]) for run in operations]
    torch.set_num_threads(threads)
    try:
        for rows in (2, 3, 7, 33, 63, 64):
            for run, expected in zip(operations, alone, strict=True):
                assert torch.equal(run(gate_up[:rows]), expected[:rows]), (rows, run)
    finally:
        torch.set_num_threads(1)


def test_angles_do_not_depend_on_the_batch():
    first, second = (Rope(RopeConfig(10_000.0), 2, 1, 24) for _ in range(2))
    ahead = second.angles(torch.tensor([999]), 1000)
    far = first.angles(torch.tensor([3, 999, 140]), 1000)
    near = second.angles(torch.tensor([3]), 4)
    for index in range(2):
        assert torch.equal(far[index][:1], near[index])
        assert torch.equal(far[index][1:2], ahead[index])
