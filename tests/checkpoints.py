"""Small real checkpoints for tests: random weights, a byte tokenizer, saved as safetensors."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

EOS = 256
VOCAB_SIZE = 257


def byte_tokenizer() -> Tokenizer:
    """One token per byte, and an end-of-text token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def save_llama(path: Path, *, max_context: int = 512, seed: int = 0) -> Path:
    """A two-layer Llama with grouped-query attention; weights are exact in fp16."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_context,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 4 if parameter.ndim > 1 else 1
            parameter.copy_((scale * parameter).half().float())
    model.save_pretrained(path)
    byte_tokenizer().save(str(path / "tokenizer.json"))
    return path


@functools.cache
def tiny_llama() -> Path:
    """The checkpoint most tests share, made once per run."""
    return save_llama(Path(tempfile.mkdtemp(prefix="tandem-test-")) / "tiny-llama")
