"""What tests of experiments share: tiny real checkpoints, and texts of letters."""

from __future__ import annotations

import random

import pytest

from bench.eval import decoding
from bench.eval.experiment import Settings
from bench.inflate import Pair
from tests.checkpoints import save_llama, tiny_llama


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny target and a stranger as its draft."""
    return Pair(tiny_llama(), save_llama(tmp_path_factory.mktemp("pair") / "stranger", seed=5))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Lines of random letters, every other one shorter than a sample."""
    draw, path = random.Random(0), tmp_path_factory.mktemp("texts") / "letters.txt"
    lines = ["".join(draw.choices("abcdefgh ", k=length)) for length in (150, 90) * 12]
    path.write_text("\n\n".join(lines))
    return path


@pytest.fixture
def settings(pair, texts, monkeypatch):
    """Two samples of few new tokens."""
    monkeypatch.setattr(decoding, "OUTPUT_TOKENS", 72)
    return Settings(target=pair.target, draft=pair.draft, texts=(texts,), samples=2, rounds=2, threads=1)
