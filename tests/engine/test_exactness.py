"""Bitwise promises: a row's logits depend on its own tokens and on nothing else in the forward."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.batch import SequenceRows

PROMPT = torch.randint(3, 160, (150,), generator=torch.Generator().manual_seed(3)).tolist()
BLOCKS = 10  # per sequence of at most 160 tokens


LEAN = ("llama2-auto", "llama3-auto", "llama3-fp32", "llama3-plain", "llama-linear-auto", "mistral-auto")
LEAN += ("qwen2-auto", "qwen3-fp32", "olmo-auto", "olmo2-auto")
HALVES = ("llama3-auto", "llama-linear-auto", "mistral-auto", "olmo2-auto")  # as which KV is held
TRANSFORMERS = ("llama2-auto", "llama3-auto", "llama3-fp32", "llama3-plain", "mistral-auto", "gemma2-auto")


@pytest.fixture(
    scope="module",
    params=[f"{name}-{own}" for own in ("native", "lean") for name in LEAN]
    + [f"{name}-native:{dtype}" for dtype in ("float16", "bfloat16") for name in HALVES]
    + [f"{name}-transformers" for name in TRANSFORMERS],
)
def runner(request, make_runner):
    name, linear, how = request.param.rsplit("-", 2)
    implementation, _, kv_dtype = how.partition(":")
    return make_runner(
        name, linear=linear, fp16_exact=True, implementation=implementation, kv_dtype=kv_dtype or "auto"
    )


def table(index):
    return list(range(index * BLOCKS, (index + 1) * BLOCKS))


def forward(runner, *sequences):
    return runner.forward(runner.batch([SequenceRows(*s) for s in sequences]))


@pytest.fixture(scope="module")
def alone(runner):
    """`alone(shift)[i]`: logits after token i of the prompt rotated by `shift`, decoded by itself."""
    known = {}

    def decode(shift):
        if shift not in known:
            tokens = PROMPT[shift:] + PROMPT[:shift]
            rows = [forward(runner, (tokens[:8], 0, table(5), 8))]
            rows += [forward(runner, (tokens[i : i + 1], i, table(5))) for i in range(8, len(tokens))]
            known[shift] = tokens, torch.cat(rows)
        return known[shift]

    return decode


SHIFTS = (0, 77)
sequence = st.tuples(st.sampled_from(SHIFTS), st.integers(0, 140), st.integers(1, 4), st.booleans())


@settings(max_examples=6, deadline=None)  # times 37 models, kernels and implementations
@given(st.lists(sequence, min_size=1, max_size=5))
def test_batched_rows_equal_lone_decode(runner, alone, batch):
    """Decode rows, verify rows and prompts of a random ragged batch, bit by bit."""
    rows, expected = [], []
    for index, (shift, start, count, fresh) in enumerate(batch):
        tokens, logits = alone(shift)
        if fresh or start == 0:
            rows.append((tokens[: start + count], 0, table(index), 1))
            expected.append(logits[start + count - 1 : start + count])
        else:
            forward(runner, (tokens[:start], 0, table(index), 0))
            rows.append((tokens[start : start + count], start, table(index), count))
            expected.append(logits[start : start + count])
    assert torch.equal(forward(runner, *rows), torch.cat(expected))


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 149), max_size=4, unique=True))
def test_chunk_borders_change_no_bit(runner, alone, borders):
    tokens, logits = alone(0)
    cuts = [0, *sorted(borders), 150]
    for start, stop in itertools.pairwise(cuts):
        last = forward(runner, (tokens[start:stop], start, table(1)))
    assert torch.equal(last[0], logits[-1])


def test_many_rows_equal_lone_decode(runner, alone):
    """More rows in one step than one tile of the linear kernels."""
    tokens, logits = alone(0)
    forward(runner, (tokens[:100], 0, table(0), 0))
    rows = [(tokens[100:103], 100, table(0), 3)] * 23
    assert torch.equal(forward(runner, *rows), logits[100:103].repeat(23, 1))


def test_thread_count_changes_no_bit(runner, alone):
    tokens, logits = alone(77)
    torch.set_num_threads(2)
    try:
        forward(runner, (tokens[:90], 0, table(0), 0), (tokens[:40], 0, table(1), 0))
        actual = forward(runner, (tokens[90:93], 90, table(0), 3), (tokens[40:41], 40, table(1)))
    finally:
        torch.set_num_threads(1)
    assert torch.equal(actual, torch.cat([logits[90:93], logits[40:41]]))


def test_poisoned_pool_changes_no_bit(runner, alone):
    """NaN in every slot nobody wrote, as recycled blocks may hold, must not reach any row."""
    tokens, logits = alone(77)
    runner.cache.write_blocks(range(60), b"\xff" * (60 * runner.cache.block_bytes))
    assert not runner.cache.check_finite(table(0), 1)
    first = forward(runner, (tokens[:35], 0, table(0)), (tokens[:60], 0, table(1)), (tokens[:3], 0, table(2)))
    assert torch.equal(first, logits[[34, 59, 2]])
    second = forward(
        runner,
        (tokens[35:37], 35, table(0), 2),
        (tokens[60:100], 60, table(1)),
        (tokens[3:4], 3, table(2)),
    )
    assert torch.equal(second, logits[[35, 36, 99, 3]])
    if runner.implementation != "native":  # it reads tokens, the others whole blocks
        assert runner.cache.check_finite(table(1), 112)  # the rest of the last block was cleared
    assert not runner.cache.check_finite(table(1), 113)


def test_moved_blocks_change_no_bit(runner, alone):
    """What a hand-off does: blocks leave as bytes, layer by layer, and arrive under other ids."""
    tokens, logits = alone(0)
    forward(runner, (tokens[:70], 0, table(0), 0))
    source, target = table(0)[:5], [59, 12, 33, 48, 27]
    for layer in range(runner.geometry.num_layers):
        wire = runner.cache.read_blocks(source, layer, 1).view(torch.uint8).numpy().tobytes()
        runner.cache.write_blocks(target, wire, layer, 1)
    assert torch.equal(forward(runner, (tokens[70:73], 70, target, 3)), logits[70:73])
