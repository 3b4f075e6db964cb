"""All numbers of draft tokens and thresholds in one batch, per draft and precision, give plain tokens."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from decode_worker.decoder import PlainDecoder
from decode_worker.drafting import make_decoder
from decode_worker.sequence import DecodeSequence
from decode_worker.speculative import SpeculativeDecoder
from tandem.config import CacheConfig, ClusterConfig, ModelConfig, SpeculationConfig
from tandem.draft_checkpoint import usable_draft
from tandem.engine.batch import SequenceRows
from tandem.engine.loading import load_engine
from tandem.engine.model_runner import ModelRunner
from tandem.engine.work_state import sampling_state
from tandem.sampling import SamplingParams
from tandem.speculation import SpeculationParams, SpeculationPolicy
from tandem.tokenizer import Tokenizer
from tandem.work import Work
from tests.checkpoints import save_llama, tiny_llama
from tests.decode_worker.test_speculative import HANDLE, run

NUM_PROMPTS, NUM_TOKENS, BLOCK_SIZE, BLOCKS_EACH = 300, 12, 16, 5
CONTROLS = list(itertools.product((1, 2, 3, 5, 7), (1e-4, 0.2, 0.4)))
POLICIES = (SpeculationPolicy.EXACT, SpeculationPolicy.AUTO)
PRECISIONS = [("none", "none"), ("none", "int8"), ("none", "nf4"), ("none", "fp4-dq"), ("none", "int4")]
PRECISIONS += [("int8", "nf4"), ("nf4", "int8")]
SETUPS = [("model", *pair) for pair in PRECISIONS]
SETUPS += [("model", "int8-a8", "nf4-a8"), ("model", "none", "auto")]
SETUPS += [("self", *pair) for pair in PRECISIONS[1:]]
SETUPS += [("qspec", kind, "none") for kind in ("nf4", "fp4", "int4")] + [("ngram", "none", "none")]


def sequences(target: ModelRunner, *, speculates: bool) -> list[DecodeSequence]:
    """Prompts of 1 to 50 tokens, each with controls of its own, prefilled in one batch."""
    tokenizer, rng = Tokenizer.from_dir(tiny_llama()), np.random.default_rng(11)
    found = []
    for index in range(NUM_PROMPTS):
        count, tau = CONTROLS[index % len(CONTROLS)]
        controls = SpeculationParams(
            policy=POLICIES[index % 2], num_assistant_tokens=count, assistant_confidence_threshold=tau
        )
        off = SpeculationParams(policy=SpeculationPolicy.OFF)
        length = int(rng.integers(1, 50))
        work = Work(
            request_id=f"r{index}",
            epoch=1,
            token_ids=tuple(rng.integers(0, 256, length + 1).tolist()),
            num_prompt_tokens=length,
            sampling=SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, seed=index),
            deadline_s=time.monotonic() + 100,
            fingerprint=bytes(32),
            speculation=controls if speculates else off,
        )
        found.append(
            DecodeSequence(
                work,
                HANDLE,
                emit=lambda news: None,
                output=work.output_stream(tokenizer, ()),
                sampling=sampling_state(work, target),
                blocks=list(range(index * BLOCKS_EACH, (index + 1) * BLOCKS_EACH)),
            )
        )
    rows = [SequenceRows(s.work.token_ids[:-1], 0, s.blocks, num_logits=0) for s in found]
    target.forward(target.batch([row._replace(num_logits=1) for row in rows]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("draft", "target_bits", "draft_bits"), SETUPS, ids=["-".join(setup) for setup in SETUPS]
)
def test_all_controls_in_one_batch_give_plain_tokens(tmp_path, draft, target_bits, draft_bits) -> None:
    path = save_llama(tmp_path / "draft", seed=5) if draft == "model" else None
    config = ClusterConfig(
        model=ModelConfig(path=tiny_llama(), quantization=target_bits),
        cache=CacheConfig(block_size=BLOCK_SIZE),
        speculation=SpeculationConfig(
            draft=draft,
            draft_path=path,
            draft_quantization=draft_bits,
            draft_activation_bits=8 if draft == "qspec" else 0,  # others may be faster here
        ),
    )
    engine = load_engine(config, "decode", 1 << 27, 1, usable_draft(config))
    expected = run(PlainDecoder(engine.model), sequences(engine.model, speculates=False))
    decoder = make_decoder(config.speculation, engine)
    assert isinstance(decoder, SpeculativeDecoder)
    assert run(decoder, sequences(engine.model, speculates=True)) == expected
    stats = decoder.stats
    assert stats.num_drafted > 0
    assert stats.num_rollbacks > 0  # wrong guesses were among them
    assert draft == "ngram" or stats.drafted_at[6] > 0
