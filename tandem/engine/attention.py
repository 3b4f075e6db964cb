"""Attention over the paged cache, for the lean decoder and for transformers' modules alike.

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

import torch
import torch.nn.functional as F

from tandem.engine.batch import KV_TILE, ChunkRows, DecodeRows, ForwardBatch, FreshGroup, pad_rows
from tandem.engine.paged_cache import PagedCache

QUERY_SLICE = 64  # prompt rows attended at once


class PagedAttention:
    """The settings of one layer's attention, and the three ways rows get their keys.

    With no `scaling`, the query comes scaled.
    """

    __slots__ = ("kv_heads", "scaling", "softcap", "window")

    def __init__(
        self,
        kv_heads: int,
        scaling: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> None:
        self.kv_heads = kv_heads
        self.scaling = scaling
        self.window = window
        self.softcap = softcap

    def attend(
        self,
        q: torch.Tensor,  # [rows, heads, dim]; rows past the batch's own are padding and come out zero
        kv: torch.Tensor,  # [rows, 2 · kv_heads, dim]; the batch's own are in the cache, too
        batch: ForwardBatch,
        cache: PagedCache,
        layer: int,
    ) -> torch.Tensor:
        """What each row sees, `[rows, heads, dim]`."""
        if self.scaling is not None:
            q = q * self.scaling
        decode = batch.decode
        if decode is not None and decode.rows is None and q.shape[0] == batch.num_rows:
            return self._decode(q, decode, cache, layer)
        out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        if decode is not None:
            rows = q[: batch.num_rows] if decode.rows is None else q[decode.rows.flatten()]
            _scatter(out, self._decode(rows, decode, cache, layer), decode.rows, decode.real)
        held = kv.to(cache.dtype).to(q.dtype)  # as a later chunk finds it: cuts make no difference
        for group in batch.fresh:
            self._fresh(out, q, held, group, batch)
        for chunk in batch.chunks:
            self._chunk(out, q, chunk, batch, cache, layer)
        return out

    def _decode(self, q: torch.Tensor, decode: DecodeRows, cache: PagedCache, layer: int) -> torch.Tensor:
        """The few rows of a sequence, `[sequences · most_rows, heads, dim]`, against its gathered context."""
        sequences, most_rows = decode.context_lens.shape
        all_rows, heads, dim = q.shape
        group = heads // self.kv_heads
        matrices, rows = sequences * self.kv_heads, most_rows * group
        if most_rows > 1:
            q = q.view(sequences, most_rows, self.kv_heads, group, dim).transpose(1, 2)
        keys, values = (x.to(q.dtype) for x in cache.gather(layer, decode.gather_index, matrices))
        bias = decode.bias(self.window, self.kv_heads, group, q.dtype)
        attended = self._attend(pad_rows(q.reshape(matrices, rows, dim)), keys, values, bias)
        if attended.shape[1] != rows:
            attended = attended[:, :rows]
        if most_rows > 1:
            attended = attended.view(sequences, self.kv_heads, most_rows, group, dim).transpose(1, 2)
        return attended.reshape(all_rows, heads, dim)

    def _fresh(
        self, out: torch.Tensor, q: torch.Tensor, kv: torch.Tensor, group: FreshGroup, batch: ForwardBatch
    ) -> None:
        """Padded prompts against themselves. What padding rows compute is dropped."""
        keys, values = (self._by_head(x) for x in kv[group.rows].chunk(2, 2))
        result = self._slices(q[group.rows], keys, values, 0, batch)
        _scatter(out, result.flatten(0, 1), group.rows, group.real)

    def _chunk(
        self,
        out: torch.Tensor,
        q: torch.Tensor,
        chunk: ChunkRows,
        batch: ForwardBatch,
        cache: PagedCache,
        layer: int,
    ) -> None:
        """New rows of one prompt against everything cached so far, themselves included."""
        keys, values = (x.to(q.dtype) for x in cache.gather(layer, chunk.gather_index, self.kv_heads))
        rows = slice(chunk.first_row, chunk.first_row + chunk.num_rows)
        out[rows] = self._slices(q[rows][None], keys, values, chunk.start, batch)[0]

    def _by_head(self, x: torch.Tensor) -> torch.Tensor:
        """`[prompts, tokens, kv_heads, dim]` → `[prompts · kv_heads, tokens padded to a tile, dim]`."""
        padding = -x.shape[1] % KV_TILE
        return F.pad(x.transpose(1, 2), (0, 0, 0, padding)).flatten(0, 1)

    def _slices(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, batch: ForwardBatch
    ) -> torch.Tensor:
        """Attend `q` [prompts, rows, heads, dim], whose first row is at position `start`, slice by slice."""
        prompts, num_rows, heads, dim = q.shape
        q = q.view(prompts, num_rows, self.kv_heads, -1, dim).transpose(1, 2)
        out = q.new_empty(q.shape)  # [prompts, kv_heads, rows, group, dim]
        for first in range(0, num_rows, QUERY_SLICE):
            part = q[:, :, first : first + QUERY_SLICE]
            count, group = part.shape[2:4]
            seen = -(-(start + first + count) // KV_TILE) * KV_TILE
            attended = self._attend(
                pad_rows(part.reshape(prompts * self.kv_heads, count * group, dim)),
                keys[:, :seen],
                values[:, :seen],
                self._bias(start + first, count, group, seen, q, batch),
            )
            out[:, :, first : first + count] = attended[:, : count * group].view(part.shape)
        return out.transpose(1, 2).reshape(prompts, num_rows, heads, dim)

    def _bias(
        self, start: int, count: int, group: int, length: int, like: torch.Tensor, batch: ForwardBatch
    ) -> torch.Tensor:
        """The causal bias, built once per batch: without a window it depends on the last tiles only."""
        if self.window is not None:
            return self._causal_bias(start, count, group, length, like)
        skipped = start // KV_TILE * KV_TILE
        key = (start - skipped, count, group, length - skipped)
        if key not in batch.biases:
            batch.biases[key] = self._causal_bias(start, count, group, length, like)
        return batch.biases[key]

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
        return pad_rows(bias)

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
        hidden = scores if bias.shape[-1] == scores.shape[-1] else scores[..., -bias.shape[-1] :]
        hidden.add_(bias)
        probs = torch.softmax(scores, -1, torch.float32)
        if probs.dtype != q.dtype:
            probs = probs.to(q.dtype)
        matrices, rows, length = probs.shape
        tiles = length // KV_TILE
        if tiles == 1:
            return torch.bmm(probs, v)
        probs = probs.view(matrices, rows, tiles, KV_TILE).transpose(1, 2)
        partial = torch.bmm(
            probs.reshape(matrices * tiles, rows, KV_TILE), v.reshape(matrices * tiles, KV_TILE, -1)
        )
        return partial.view(matrices, tiles, rows, -1).sum(1)


def _scatter(
    out: torch.Tensor, result: torch.Tensor, rows: torch.Tensor | None, real: torch.Tensor | None
) -> None:
    """Put `result` [a · b, heads, dim] where its `rows` [a, b] belong in `out`; padding is dropped."""
    if rows is None:
        out[: result.shape[0]] = result
    elif real is None:
        out[rows.flatten()] = result
    else:
        out[rows[real]] = result[real.flatten()]
