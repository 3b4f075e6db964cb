"""Tiny random checkpoints of each supported architecture, saved once per test run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers

from tandem.engine.model_runner import ModelRunner
from tandem.engine.native import build, library
from tandem.engine.native.kernels import can_load

BASE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ALTERNATING = ["sliding_attention", "full_attention"]
ARCHITECTURES: dict[str, tuple[str, dict[str, object]]] = {
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama-linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}, "head_dim": 24}
        | {"attention_bias": True, "mlp_bias": True, "intermediate_size": 100},
    ),
    "mistral": ("Mistral", {"sliding_window": 24}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "olmo": ("Olmo", {"clip_qkv": 0.5}),
    "olmo2": ("Olmo2", {}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 32, "sliding_window": 24, "layer_types": ALTERNATING, "query_pre_attn_scalar": 20}
        | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": ("Gemma3Text", {"head_dim": 32, "sliding_window": 24, "layer_types": ALTERNATING}),
}
ONLY_TRANSFORMERS = ("gemma2", "gemma3")
CAUSAL_LM = {"Gemma3Text": "Gemma3ForCausalLM"}


def build_model(name: str, *, fp16_exact: bool = False) -> torch.nn.Module:
    """A random model; biases and norm weights are random too, so that nothing is multiplied by one."""
    family, changes = ARCHITECTURES[name]
    config = getattr(transformers, f"{family}Config")(**BASE | changes)
    config._attn_implementation = "eager"
    torch.manual_seed(7)
    model: torch.nn.Module = getattr(transformers, CAUSAL_LM.get(family, f"{family}ForCausalLM"))(config)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim == 1 else 0.1
            parameter.add_(scale * torch.randn(parameter.shape))
            if fp16_exact:
                parameter.copy_(parameter.half().float())
    return model.eval()


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[torch.nn.Module, Path]]:
    """`saved_model(name, fp16_exact=...)` → the eager reference and the folder of its checkpoint."""
    made: dict[tuple[str, bool], tuple[torch.nn.Module, Path]] = {}

    def make(name: str, fp16_exact: bool = False) -> tuple[torch.nn.Module, Path]:
        key = (name, fp16_exact)
        if key not in made:
            path = tmp_path_factory.mktemp(name)
            model = build_model(name, fp16_exact=fp16_exact)
            model.save_pretrained(path)  # type: ignore[operator]
            made[key] = model, path
        return made[key]

    return make


@pytest.fixture(scope="session")
def make_runner(
    saved_model: Callable[..., tuple[torch.nn.Module, Path]],
) -> Callable[..., ModelRunner]:
    """`make_runner(name, linear=..., ...)` → a runner of 64 blocks of 16 tokens, made once."""
    made: dict[tuple[str, str, bool, str, str], ModelRunner] = {}

    def make(
        name: str,
        linear: str = "auto",
        fp16_exact: bool = False,
        implementation: str = "auto",
        kv_dtype: str = "auto",
    ) -> ModelRunner:
        key = (name, linear, fp16_exact, implementation, kv_dtype)
        if key not in made:
            path = saved_model(name, fp16_exact)[1]
            made[key] = ModelRunner.load(
                path,
                linear=linear,
                num_blocks=64,
                block_size=16,
                implementation=implementation,
                kv_dtype=kv_dtype,
            )
        return made[key]

    return make


@pytest.fixture
def unbuilt() -> Iterator[None]:
    """Kernels are looked for anew, in this test and after it."""
    _forget_kernels()
    yield
    _forget_kernels()


def _forget_kernels() -> None:
    library.load.cache_clear()
    can_load.cache_clear()


LESSER = {"avx2": "avx512", "avx512": "avx512bf16"}  # instruction sets, and what has more
OTHERS = ["plain", "avx512-emulated"]
OTHERS += [isa for isa, more in LESSER.items() if build.NEEDS[more] <= build.cpu_flags()]


@pytest.fixture(params=OTHERS)
def other_isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Another instruction set than this CPU's best. The code for AVX-512 runs on AVX2's instructions."""
    isa: str = request.param
    if isa == "avx512-emulated":
        header = Path(__file__).with_name("avx512_emulated.h")
        version = f"-DEMULATION=0x{hashlib.sha256(header.read_bytes()).hexdigest()[:8]}"
        monkeypatch.setitem(build.NEEDS, isa, build.NEEDS["avx2"])
        monkeypatch.setitem(build.ISA_FLAGS, isa, (*build.AVX2_FLAGS, "-include", str(header), version))
    return isa
