"""Checkpoints in the Hugging Face layout: fp16 safetensors, config and tokenizer files.

Knows file names and formats, and what storing in fp16 changes. Knows nothing of training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.bundled_pair.corpus import END_OF_TEXT, END_OF_TEXT_ID
from bench.bundled_pair.model import Llama, Shape


def config(shape: Shape) -> dict[str, Any]:
    """The contents of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.context,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "rms_norm_eps": shape.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": END_OF_TEXT_ID,
        "eos_token_id": END_OF_TEXT_ID,
        "pad_token_id": END_OF_TEXT_ID,
        "dtype": "float16",
    }


def shape_of(folder: Path) -> Shape:
    """The sizes a checkpoint's config.json states."""
    stated = json.loads((folder / "config.json").read_text())
    return Shape(
        hidden=stated["hidden_size"],
        layers=stated["num_hidden_layers"],
        heads=stated["num_attention_heads"],
        kv_heads=stated["num_key_value_heads"],
        ffn=stated["intermediate_size"],
        vocab=stated["vocab_size"],
        context=stated["max_position_embeddings"],
        rope_theta=stated["rope_theta"],
        norm_eps=stated["rms_norm_eps"],
    )


def tokenizer_config(context: int) -> dict[str, Any]:
    """The contents of tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }


def halves(model: Llama) -> dict[str, Tensor]:
    """The model's parameters rounded to fp16, on the CPU."""
    return {name: value.detach().half().cpu().contiguous() for name, value in model.state_dict().items()}


def save(folder: Path, model: Llama, tokenizer: Path) -> None:
    """Writes the whole checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(halves(model), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    generation = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), END_OF_TEXT_ID)
    for name, contents in (
        ("config.json", config(model.shape)),
        ("tokenizer_config.json", tokenizer_config(model.shape.context)),
        ("generation_config.json", {**generation, "do_sample": False}),
    ):
        (folder / name).write_text(json.dumps(contents, indent=2) + "\n")


def load(folder: Path) -> Llama:
    """The checkpoint's model with its fp16 weights widened to fp32, in evaluation mode."""
    model = Llama(shape_of(folder))
    stored = load_file(folder / "model.safetensors")
    model.load_state_dict({name: value.float() for name, value in stored.items()})
    return model.eval()


@torch.no_grad()
def rounding_error(model: Llama, ids: Tensor) -> float:
    """The largest change of any logit on `ids` when the weights are stored in fp16; all in fp32."""
    rounded = Llama(model.shape)
    rounded.load_state_dict({name: value.float() for name, value in halves(model).items()})
    exact = Llama(model.shape)
    exact.load_state_dict({name: value.cpu() for name, value in model.state_dict().items()})
    change: Tensor = rounded.eval()(ids.cpu()) - exact.eval()(ids.cpu())
    return change.abs().max().item()
