"""The bundled pair loads, fits, shares one lossless tokenizer, has learnt Python, and agrees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.bundled_pair.checkpoint import load
from bench.bundled_pair.corpus import VOCAB_SIZE, SourceFile, split, standard_library
from bench.bundled_pair.evaluate import accepted_lengths
from bench.bundled_pair.model import parameter_count
from bench.bundled_pair.unloop import looping, repeated

MODELS = Path(__file__).resolve().parents[2] / "tandem" / "models"
PAIR = ("target", "draft")
HELD_OUT_MODULE = "selectors.py"
TOKENS = 512
LARGEST_TOTAL = 24_000_000
TARGET_LOSS, DRAFT_LOSS, AGREEMENT = 2.2, 2.6, 0.62  # chance: ln 4096 = 8.3, 8.3 and 0.0002

NASTY = [
    "",
    " ",
    "\n",
    "\r\n\t \x00\x7f",
    "    return x  \n\n\n\tif y:\n",
    "naïve café — “quotes”…",
    "日本語の文字列",
    "👩‍👩‍👧‍👦🏳️‍🌈 \u200d\ufe0f",
    "e\u0301 \u00e9 \ufb01 \u2126",
    "\u202eright to left\u202c ابجد",
    "0123456789" * 7 + " 1_000_000.5e-7",
    "<|endoftext|>",
    "a<|endoftext|>b <| endoftext |>",
    "\U0010ffff\ue000\ufeff",
    "x" * 3000,
]


@pytest.fixture(scope="module")
def models():
    """Both models through transformers, their fp16 weights widened to fp32."""
    return {name: AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32) for name in PAIR}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODELS / "target" / "tokenizer.json"))


@pytest.fixture(scope="module")
def logits(models, tokenizer):
    """The ids of a held-out module's beginning, and both models' logits on them."""
    text = (standard_library() / HELD_OUT_MODULE).read_text()
    ids = torch.tensor([tokenizer.encode(text).ids[:TOKENS]])
    with torch.no_grad():
        return ids[0], {name: model(ids).logits[0] for name, model in models.items()}


def library_paths() -> set[str]:
    """The relative paths of the library's modules, third-party packages left out."""
    root = standard_library()
    tops = (top for top in root.iterdir() if top.name not in ("site-packages", "dist-packages"))
    files = (path for top in tops for path in ([top] if top.is_file() else top.rglob("*.py")))
    return {path.relative_to(root).as_posix() for path in files if path.suffix == ".py"}


def held_out_list() -> list[str]:
    return (MODELS / "heldout.txt").read_text().split()


def test_the_files_are_small_enough():
    assert sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) <= LARGEST_TOTAL


@pytest.mark.parametrize("name", PAIR)
def test_the_config_is_what_serving_expects(name):
    config = json.loads((MODELS / name / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["vocab_size"] == VOCAB_SIZE
    assert config["max_position_embeddings"] == 2048
    assert config["tie_word_embeddings"] is True
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["hidden_size"] % 32 == 0
    assert config["head_dim"] in (32, 64)


def test_the_draft_is_much_smaller_than_the_target(models):
    target, draft = (parameter_count(models[name]) for name in PAIR)
    assert 7_000_000 < target < 9_000_000
    assert draft * 9 < target


def test_both_use_the_same_tokenizer(tokenizer):
    one, other = ((MODELS / name / "tokenizer.json").read_bytes() for name in PAIR)
    assert one == other
    assert tokenizer.get_vocab_size() == VOCAB_SIZE


@pytest.mark.parametrize("text", NASTY)
def test_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_no_token_is_added(tokenizer):
    assert tokenizer.encode("").ids == []
    ids = tokenizer.encode("def f(x):\n    return x\n").ids
    assert AutoTokenizer.from_pretrained(MODELS / "draft")("def f(x):\n    return x\n").input_ids == ids
    assert tokenizer.token_to_id("<|endoftext|>") not in ids


def test_newlines_and_indentation_are_tokens_of_their_own(tokenizer):
    whole = tokenizer.encode("def f(x):\n    return x").ids
    parts = ("def f(x):", "\n", "    ", "return x")
    assert whole == [token for part in parts for token in tokenizer.encode(part).ids]


@pytest.mark.parametrize(("name", "bound"), [("target", TARGET_LOSS), ("draft", DRAFT_LOSS)])
def test_held_out_text_is_predicted(logits, name, bound):
    ids, of = logits
    assert F.cross_entropy(of[name][:-1], ids[1:]).item() < bound


def test_the_draft_agrees_with_the_target(logits):
    _, of = logits
    assert (of["draft"].argmax(-1) == of["target"].argmax(-1)).float().mean().item() > AGREEMENT


@pytest.mark.parametrize("name", PAIR)
def test_the_training_code_computes_the_same_function(logits, name):
    ids, of = logits
    with torch.no_grad():
        own = load(MODELS / name)(ids[None, :128])[0]
    torch.testing.assert_close(own, of[name][:128], rtol=0, atol=1e-3)


def test_held_out_modules_are_not_in_the_training_list():
    listed = set(held_out_list())
    train, held_out = split(SourceFile(path, "") for path in sorted(library_paths() | listed))
    assert HELD_OUT_MODULE in listed
    assert listed <= {file.path for file in held_out}
    assert listed.isdisjoint(file.path for file in train)
    assert len(train) > 10 * len(held_out)


def test_repetitions_are_marked_from_their_second_whole_period():
    row = torch.tensor([[1, 2, 3, 4] + [11, 12, 13, 14, 15, 16, 17] * 3])
    assert repeated(row)[0].nonzero().flatten().tolist() == list(range(4 + 13, 4 + 21))
    assert not repeated(torch.arange(30)[None]).any()


def test_a_loop_is_a_periodic_end():
    loop = torch.cat((torch.arange(48), torch.arange(20).repeat(4)))
    assert looping(torch.stack((loop, torch.arange(128)))).tolist() == [True, False]


def test_accepted_lengths_follow_the_rounds():
    assert accepted_lengths(torch.ones(1, 12, dtype=torch.bool), 3) == 3
    assert accepted_lengths(torch.zeros(1, 12, dtype=torch.bool), 3) == 0
    assert accepted_lengths(torch.tensor([[True, False, True, True, True, True, True]]), 3) == 2
