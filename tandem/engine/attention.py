"""Attention over the paged cache, as one function that transformers' own modules call.

One formulation serves decode, verification, fresh prompts and prompt chunks, and it is chosen so that a
row's result depends on nothing but the row: not on its batch-mates, not on the padded length, not on
how the prompt was cut. On CPUs, `scaled_dot_product_attention` is not like that (its blocking follows the
padded length, and with one query it splits keys over threads), nor is a plain matrix product with few
rows. What is bitwise stable, and what this module does:

    scores    q · Kᵀ with the query rows padded to a multiple of 4: each score is one dot product over
              head_dim, in the same order for any number of rows, keys and matrices
    softmax   over keys padded with -inf to a multiple of 64, so padding adds exact zeros at the end
    values    one product per 64 keys, always [rows, 64] · [64, head_dim], then summed over the tiles

Query rows are the query heads of one KV head, times the rows of the sequence: one for decode, k + 1 for
verification. A prompt goes in slices of `QUERY_SLICE` rows, each against the keys it can see.
Knows nothing of requests or block owners.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from tandem.engine.batch import KV_TILE, ChunkRows, DecodeRows, ForwardBatch, FreshGroup
from tandem.engine.paged_cache import PagedCache
from tandem.errors import ConfigError

NAME = "tandem_paged"
QUERY_SLICE = 64  # prompt rows attended at once
ROW_MULTIPLE = 4  # query rows per matrix product


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, heads, rows, head_dim]
    key: torch.Tensor,  # [1, kv_heads, rows, head_dim]
    value: torch.Tensor,  # [1, kv_heads, rows, head_dim]
    attention_mask: torch.Tensor | None,
    *,
    forward_batch: ForwardBatch,
    cache: PagedCache,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Write the new keys and values, then attend. Rows past the batch's own are padding and come out zero."""
    if kwargs.get("s_aux") is not None:
        raise ConfigError("this model uses attention sinks, which Tandem does not support")
    q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    batch, rows = forward_batch, forward_batch.num_rows
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    cache.write(layer, batch.slot_mapping, k[:rows], v[:rows])
    kernel = _Kernel(k.shape[1], q.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    out = q.new_zeros(q.shape)  # [rows, heads, head_dim]
    if batch.decode is not None:
        kernel.decode(out, q, batch.decode, cache, layer)
    for group in batch.fresh:
        kernel.fresh(out, q, k, v, group)
    for chunk in batch.chunks:
        kernel.chunk(out, q, chunk, cache, layer)
    return out[None], None


class _Kernel:
    """The settings of one layer's attention, and the four ways rows get their keys."""

    __slots__ = ("kv_heads", "scaling", "softcap", "window")

    def __init__(self, kv_heads: int, scaling: float, window: int | None, softcap: float | None) -> None:
        self.kv_heads = kv_heads
        self.scaling = scaling
        self.window = window
        self.softcap = softcap

    def decode(
        self, out: torch.Tensor, q: torch.Tensor, decode: DecodeRows, cache: PagedCache, layer: int
    ) -> None:
        """The few rows of each sequence against its gathered context."""
        sequences, most_rows = decode.context_lens.shape
        heads, dim = q.shape[1:]
        group = heads // self.kv_heads
        matrices, rows = sequences * self.kv_heads, most_rows * group
        q = q[: sequences * most_rows] if decode.rows is None else q[decode.rows]
        q = (q * self.scaling).view(sequences, most_rows, self.kv_heads, group, dim).transpose(1, 2)
        attended = self._attend(
            _pad_rows(q.reshape(matrices, rows, dim)),
            *cache.gather(layer, decode.gather_index, matrices),
            _pad_bias(decode.bias(self.window, self.kv_heads, group, q.dtype)),
        )
        result = attended[:, :rows].view(sequences, self.kv_heads, most_rows, group, dim).transpose(1, 2)
        _scatter(out, result.reshape(sequences, most_rows, heads, dim), decode.rows, decode.real)

    def fresh(
        self, out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: FreshGroup
    ) -> None:
        """Padded prompts against themselves. What padding rows compute is dropped."""
        keys, values = (self._by_head(x[group.rows]) for x in (k, v))
        result = self._slices(q[group.rows], keys, values, start=0)
        _scatter(out, result, group.rows, group.real)

    def chunk(
        self, out: torch.Tensor, q: torch.Tensor, chunk: ChunkRows, cache: PagedCache, layer: int
    ) -> None:
        """New rows of one prompt against everything cached so far, themselves included."""
        keys, values = cache.gather(layer, chunk.gather_index, self.kv_heads)
        rows = slice(chunk.first_row, chunk.first_row + chunk.num_rows)
        out[rows] = self._slices(q[rows][None], keys, values, start=chunk.start)[0]

    def _by_head(self, x: torch.Tensor) -> torch.Tensor:
        """`[prompts, tokens, kv_heads, dim]` → `[prompts · kv_heads, tokens padded to a tile, dim]`."""
        padding = -x.shape[1] % KV_TILE
        return F.pad(x.transpose(1, 2), (0, 0, 0, padding)).flatten(0, 1)

    def _slices(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int) -> torch.Tensor:
        """Attend `q` [prompts, rows, heads, dim], whose first row is at position `start`, slice by slice."""
        prompts, num_rows, heads, dim = q.shape
        q = (q * self.scaling).view(prompts, num_rows, self.kv_heads, -1, dim).transpose(1, 2)
        out = q.new_empty(q.shape)  # [prompts, kv_heads, rows, group, dim]
        for first in range(0, num_rows, QUERY_SLICE):
            part = q[:, :, first : first + QUERY_SLICE]
            count, group = part.shape[2:4]
            seen = -(-(start + first + count) // KV_TILE) * KV_TILE
            attended = self._attend(
                _pad_rows(part.reshape(prompts * self.kv_heads, count * group, dim)),
                keys[:, :seen],
                values[:, :seen],
                self._causal_bias(start + first, count, group, seen, q),
            )
            out[:, :, first : first + count] = attended[:, : count * group].view(part.shape)
        return out.transpose(1, 2).reshape(prompts, num_rows, heads, dim)

    def _causal_bias(
        self, start: int, count: int, group: int, length: int, like: torch.Tensor
    ) -> torch.Tensor:
        """`[rows of the slice, last keys]`: 0 where a row may look, else -inf; padding rows look anywhere.

        Without a window only the tiles at and after the first row hide anything.
        """
        position = torch.arange(start, start + count, device=like.device).repeat_interleave(group)[:, None]
        first = 0 if self.window is not None else start // KV_TILE * KV_TILE
        key = torch.arange(first, length, device=like.device)
        hidden = key > position
        if self.window is not None:
            hidden |= key <= position - self.window
        bias = like.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
        return _pad_bias(bias)

    def _attend(
        self,
        q: torch.Tensor,  # [matrices, rows, dim], scaled; rows is a multiple of ROW_MULTIPLE
        k: torch.Tensor,  # [matrices, length, dim]; length is a multiple of KV_TILE
        v: torch.Tensor,  # [matrices, length, dim]
        bias: torch.Tensor,  # broadcasts to [matrices, rows, n], for the last n keys
    ) -> torch.Tensor:
        scores = torch.bmm(q, k.transpose(1, 2))
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        scores[..., -bias.shape[-1] :] += bias
        probs = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        matrices, rows, length = probs.shape
        tiles = length // KV_TILE
        probs = probs.view(matrices, rows, tiles, KV_TILE).transpose(1, 2)
        partial = torch.bmm(
            probs.reshape(matrices * tiles, rows, KV_TILE), v.reshape(matrices * tiles, KV_TILE, -1)
        )
        return partial.view(matrices, tiles, rows, -1).sum(1)


def _pad_rows(q: torch.Tensor) -> torch.Tensor:
    """Query rows `[matrices, rows, dim]` padded with zeros to a multiple of `ROW_MULTIPLE`."""
    return F.pad(q, (0, 0, 0, -q.shape[1] % ROW_MULTIPLE))


def _pad_bias(bias: torch.Tensor) -> torch.Tensor:
    """The additive mask for padded query rows, which may look anywhere; one row serves all."""
    rows = bias.shape[-2]
    return bias if rows == 1 else F.pad(bias, (0, 0, 0, -rows % ROW_MULTIPLE))


def _scatter(
    out: torch.Tensor, result: torch.Tensor, rows: torch.Tensor | None, real: torch.Tensor | None
) -> None:
    """Put `result` [a, b, heads, dim] where its rows belong in `out`; padding is dropped."""
    if rows is None:
        out[: result.shape[0] * result.shape[1]] = result.flatten(0, 1)
    elif real is None:
        out[rows.flatten()] = result.flatten(0, 1)
    else:
        out[rows[real]] = result[real]


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Every mask comes from the `ForwardBatch`, so transformers builds none."""


AttentionInterface.register(NAME, paged_attention)
AttentionMaskInterface.register(NAME, _no_mask)
