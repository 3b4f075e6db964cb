"""KV in fewer bytes: how far numbers move, that sizes are what was announced, and what it does to tokens."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.speculation.text import held_out, windows
from tandem.config import BUNDLED_MODELS
from tandem.engine.batch import SequenceRows
from tandem.engine.kv_codec import decode, encode, vector_bytes
from tandem.engine.kv_transfer import block_bytes, export_kv, import_kv
from tandem.engine.model_runner import ModelRunner
from tandem.engine.paged_cache import PagedCache
from tandem.errors import Internal
from tandem.geometry import KV_CODECS, ModelGeometry

# Of the largest number of a group: half a step, and the rounding of its scale to eight bits.
MAX_ERROR = {"raw": 0.0, "fp16": 2**-11, "int8": 0.5 / 127 + 2**-8, "int4": 0.5 / 7 + 2**-8}

GEOMETRY = ModelGeometry(
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden_size=32,
    vocab_size=100,
    max_context=64,
    num_parameters=1,
)


@given(
    codec=st.sampled_from(KV_CODECS),
    head_dim=st.sampled_from([2, 16, 24, 32, 64, 128]),
    size=st.floats(1e-3, 1e3),
    seed=st.integers(0, 99),
)
def test_numbers_move_by_half_a_step_at_most(codec, head_dim, size, seed):
    values = size * torch.randn(3, 5, head_dim, generator=torch.Generator().manual_seed(seed))
    data = encode(values, codec)
    assert data.shape == (3, 5, vector_bytes(codec, head_dim, torch.float32))
    back = decode(data, codec, head_dim, torch.float32)
    group = 32 if head_dim % 32 == 0 else head_dim
    most = values.unflatten(-1, (-1, group)).abs().amax(-1, keepdim=True).expand(-1, -1, -1, group)
    assert ((back - values).abs() <= MAX_ERROR[codec] * most.flatten(-2) + 1e-7).all()


@pytest.mark.parametrize("codec", KV_CODECS)
def test_zeros_stay_zeros_and_extremes_stay_finite(codec):
    values = torch.zeros(2, 32)
    values[1, 3], values[1, 4] = 3e38, -1e-38
    back = decode(encode(values, codec), codec, 32, torch.float32)
    assert not back[0].any()
    assert back.isfinite().all()


def test_an_odd_head_does_not_pack():
    with pytest.raises(ValueError, match="needs an even head_dim, not 33"):
        vector_bytes("int4", 33, torch.float32)


@pytest.fixture(scope="module")
def model():
    return ModelRunner.load(BUNDLED_MODELS / "target", num_blocks=64, block_size=16)


@pytest.mark.parametrize("codec", KV_CODECS)
def test_parts_arrive_in_another_cache(model, codec):
    model.forward(model.batch([SequenceRows(list(range(5, 45)), 0, range(3))]))
    for layer in range(model.geometry.num_layers):
        part = export_kv(model.cache, [0, 1, 2], 40, layer, 1, codec)
        assert part.nbytes == 3 * block_bytes(model.cache, codec) // model.geometry.num_layers
        import_kv(model.cache, [10, 11, 12], part, layer, 1, codec)
    sent, got = model.cache.read_blocks([0, 1, 2]), model.cache.read_blocks([10, 11, 12])
    most = float(sent[:2].abs().max())
    assert torch.allclose(got[:2], sent[:2], atol=MAX_ERROR[codec] * most)
    assert torch.allclose(got[2, :, :, :8], sent[2, :, :, :8], atol=MAX_ERROR[codec] * most)
    assert not got[2, :, :, 8:].any(), "slots past the tokens are empty"
    with pytest.raises(ValueError, match="do not fill"):
        import_kv(model.cache, [10, 11], part, 0, 1, codec)


def test_numbers_that_are_not_finite_never_leave(model):
    model.cache.write_blocks([60], b"\xff\xff\xff\xff" * (model.cache.block_bytes // 4))
    with pytest.raises(Internal):
        export_kv(model.cache, [60], 16, 0, 1, "int8")


def agreement(model: ModelRunner, codec: str, texts) -> tuple[float, float]:
    """Share of positions with raw KV's greedy token behind a prompt that travelled; most drift of a logit."""
    same, drift, count = 0, 0.0, 0
    for text in texts:
        prompt, rest = text[:128], text[128:]
        model.forward(model.batch([SequenceRows(prompt, 0, range(16))]))
        sent = export_kv(model.cache, range(8), 128, 0, model.geometry.num_layers, codec)
        import_kv(model.cache, range(16, 24), sent, 0, model.geometry.num_layers, codec)
        rows = [SequenceRows(rest, 128, table, len(rest)) for table in (range(16), range(16, 32))]
        raw, moved = model.forward(model.batch(rows)).split(len(rest))
        same += int((raw.argmax(-1) == moved.argmax(-1)).sum())
        drift = max(drift, float((raw - moved).abs().max()))
        count += len(rest)
    return same / count, drift


@pytest.mark.parametrize(("codec", "least"), [("raw", 1.0), ("fp16", 0.999), ("int8", 0.99), ("int4", 0.8)])
def test_greedy_tokens_behind_kv_that_travelled(model, codec, least):
    texts = windows(held_out(Path(BUNDLED_MODELS / "target")), 16, 192)
    found, drift = agreement(model, codec, texts)
    print(f"{codec}: {100 * found:.2f} % of greedy tokens, logits drift by {drift:.3f} at most")
    assert found >= least
    assert (drift == 0) == (codec == "raw")


@given(seed=st.integers(0, 99), pair=st.permutations(("float32", "bfloat16", "float16")))
def test_raw_kv_is_rounded_to_the_wire_and_to_its_reader_and_no_further(seed, pair):
    """Once through every dtype on the way: what the reader holds is what torch makes of it."""
    wire, *ends = pair
    writer, reader = (PagedCache(GEOMETRY, 4, 4, getattr(torch, dtype)) for dtype in ends)
    values = torch.randn(3, 2, 2, 4, 2, 8, generator=torch.Generator().manual_seed(seed))
    writer.write_blocks([2, 0, 3], values.view(torch.uint8).flatten().numpy().data, dtype=torch.float32)
    for layer in range(2):
        sent = export_kv(writer, [2, 0, 3], 12, layer, 1, dtype=wire)
        assert len(sent) * 2 == 3 * block_bytes(writer, "raw", wire)
        import_kv(reader, [1, 2, 0], sent, layer, 1, dtype=wire)
    expected = values
    for dtype in (ends[0], wire, ends[1]):
        expected = expected.to(getattr(torch, dtype))
    assert torch.equal(reader.read_blocks([1, 2, 0]), expected)


def test_a_number_that_the_wire_cannot_hold_does_not_leave():
    cache = PagedCache(GEOMETRY, 1, 4)
    cache.write(0, torch.tensor([1]), torch.full((1, 4, 8), 1e5))
    assert export_kv(cache, [0], 4, 0, 1, dtype="bfloat16")
    with pytest.raises(Internal, match="non-finite value"):
        export_kv(cache, [0], 4, 0, 1, dtype="float16")
