"""The memory-fit arithmetic, with numbers worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.needs import Needs, check_context, needs_of
from tandem.errors import InvalidRequest
from tandem.geometry import ModelGeometry
from tandem.request import Request
from tandem.sampling import SamplingParams

TARGET = ModelGeometry(
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden_size=32,
    vocab_size=100,
    max_context=4096,
    num_parameters=1,
)
DRAFT = ModelGeometry(
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    hidden_size=16,
    vocab_size=100,
    max_context=4096,
    num_parameters=1,
)
TOKEN_BYTES = 2 * 2 * 2 * 8 * 4  # keys and values, layers, KV heads, head_dim, float32


def request_of(num_prompt: int, max_tokens: int, num_delivered: int = 0) -> Request:
    return Request(
        request_id="r",
        token_ids=tuple(range(num_prompt + num_delivered)),
        num_prompt_tokens=num_prompt,
        sampling=SamplingParams(),
        max_tokens=max_tokens,
        seed=1,
        deadline_s=1e9,
    )


def test_needs_of_a_request_by_hand():
    assert needs_of(request_of(20, 40), TARGET, 16, "float32", lookahead=5) == Needs(
        tokens=65,
        decode_blocks=5,
        decode_bytes=5 * 16 * TOKEN_BYTES,
        store_bytes=2 * 16 * TOKEN_BYTES,
        prefill_blocks=2,
        prefill_tokens=20,
    )


def test_a_draft_with_its_own_kv_adds_bytes_and_no_blocks():
    alone = needs_of(request_of(20, 40), TARGET, 16, "float32")
    both = needs_of(request_of(20, 40), TARGET, 16, "float32", draft=DRAFT)
    assert both.decode_blocks == alone.decode_blocks
    assert both.decode_bytes - alone.decode_bytes == 4 * 16 * (2 * 1 * 1 * 8 * 4)
    assert both.store_bytes == alone.store_bytes


def test_a_resumed_request_prefills_more_and_ends_at_the_same_length():
    fresh = needs_of(request_of(20, 40), TARGET, 16, "float32")
    resumed = needs_of(request_of(20, 40, num_delivered=30), TARGET, 16, "float32")
    assert resumed.decode_blocks == fresh.decode_blocks
    assert (resumed.prefill_tokens, resumed.prefill_blocks) == (50, 4)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 9), st.sampled_from([1, 8, 16, 64]))
def test_blocks_hold_all_tokens_and_none_is_superfluous(num_prompt, max_tokens, lookahead, block_size):
    needs = needs_of(request_of(num_prompt, max_tokens), TARGET, block_size, "bfloat16", lookahead)
    assert needs.tokens == num_prompt + max_tokens + lookahead
    assert 0 <= needs.decode_blocks * block_size - needs.tokens < block_size
    assert needs.decode_bytes == TARGET.kv_bytes(needs.decode_blocks * block_size, "bfloat16")
    assert needs.prefill_blocks <= needs.decode_blocks


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([1, 8, 16, 64]), st.data())
def test_a_running_request_never_grows_beyond_what_was_taken_for_it(num_prompt, max_tokens, block_size, data):
    """The fit that admission predicts is exact: all that may be generated is taken before anything is."""
    taken = needs_of(request_of(num_prompt, max_tokens), TARGET, block_size, "bfloat16").decode_blocks
    num_delivered = data.draw(st.integers(0, max_tokens - 1))
    later = needs_of(request_of(num_prompt, max_tokens, num_delivered), TARGET, block_size, "bfloat16")
    assert later.decode_blocks == taken
    assert later.prefill_blocks <= taken


def test_the_context_limit_names_the_callers_numbers():
    check_context(7680, 512, 8192)
    with pytest.raises(InvalidRequest) as caught:
        check_context(9001, 512, 8192)
    assert caught.value.reason == "PROMPT_TOO_LONG"
    assert caught.value.message == "prompt is 9001 tokens; the limit is 8192 minus max_tokens 512"


def test_decode_and_store_are_counted_each_in_their_own_dtype():
    wide = needs_of(request_of(20, 40), TARGET, 16, "float32", draft=DRAFT, stores_draft=True)
    half = needs_of(
        *(request_of(20, 40), TARGET, 16, "float32"), draft=DRAFT, stores_draft=True, stored_dtype="float16"
    )
    assert (half.decode_bytes, half.store_bytes) == (wide.decode_bytes, wide.store_bytes // 2)
