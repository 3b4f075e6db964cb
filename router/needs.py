"""How much memory one request takes, from the model's geometry alone, and whether its context fits.

Knows no workers and keeps no books; `router.admission` does.
"""

from __future__ import annotations

from dataclasses import dataclass

from tandem.errors import InvalidRequest
from tandem.geometry import ModelGeometry, num_blocks
from tandem.request import Request


@dataclass(frozen=True, slots=True)
class Needs:
    """What one request takes of each resource."""

    tokens: int  # prompt + max_tokens + lookahead
    decode_blocks: int
    decode_bytes: int  # of the target's KV, and the draft's where it keeps one
    store_bytes: int  # KV of the prompt, in whole blocks; the draft's too where prefill computes it
    prefill_blocks: int
    prefill_tokens: int


def needs_of(
    request: Request,
    geometry: ModelGeometry,
    block_size: int,
    dtype: str,
    lookahead: int = 0,
    draft: ModelGeometry | None = None,
    stores_draft: bool = False,
    stored_dtype: str | None = None,
) -> Needs:
    """The memory-fit arithmetic. `lookahead` is how many draft tokens a step may write past the end; KV has
    `dtype` at decode workers, and in the store `stored_dtype` if that is another one.

    For a resumed request the tokens already delivered are prefilled like a prompt; they count
    towards `max_tokens`, so the total does not change.
    """
    prefill_tokens = len(request.token_ids)
    tokens = request.max_total_tokens + lookahead
    block_bytes = geometry.block_bytes(block_size, dtype)
    draft_bytes = draft.block_bytes(block_size, dtype) if draft else 0
    stored = [geometry, draft] if draft and stores_draft else [geometry]
    stored_bytes = sum(model.block_bytes(block_size, stored_dtype or dtype) for model in stored)
    decode_blocks = num_blocks(tokens, block_size)
    prefill_blocks = num_blocks(prefill_tokens, block_size)
    return Needs(
        tokens=tokens,
        decode_blocks=decode_blocks,
        decode_bytes=decode_blocks * (block_bytes + draft_bytes),
        store_bytes=prefill_blocks * stored_bytes,
        prefill_blocks=prefill_blocks,
        prefill_tokens=prefill_tokens,
    )


def check_context(num_prompt_tokens: int, max_tokens: int, max_context: int) -> None:
    """Raise `PROMPT_TOO_LONG` unless prompt and output fit the context the model was made for."""
    if num_prompt_tokens + max_tokens > max_context:
        raise InvalidRequest(
            "PROMPT_TOO_LONG",
            f"prompt is {num_prompt_tokens} tokens; the limit is {max_context} minus max_tokens {max_tokens}",
        )
