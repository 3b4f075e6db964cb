"""Rows of training tokens, drawn anew for every pass over the corpus.

Knows how documents are shuffled, split and cut into rows. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bench.bundled_pair.corpus import END_OF_TEXT_ID, TokenArchive

SPLIT_SHARE = 0.5  # documents cut in two at a top-level statement, both parts documents of their own
ALIGNED_SHARE = 0.4  # rows that begin at a top-level statement, with nothing before it

Indices = npt.NDArray[np.int64]


def epoch_stream(data: TokenArchive, rng: np.random.Generator) -> tuple[npt.NDArray[np.uint16], Indices]:
    """One pass over the corpus in a fresh order, and the places where statements begin in it."""
    pieces: list[tuple[int, int]] = []
    for begin, end in zip(data.docs[:-1], data.docs[1:], strict=True):
        low, high = np.searchsorted(data.starts, (begin + 1, end))
        if high > low and rng.random() < SPLIT_SHARE:
            cut = int(data.starts[rng.integers(low, high)])
            pieces += [(int(begin), cut), (cut, int(end))]
        else:
            pieces.append((int(begin), int(end)))
    stream: list[npt.NDArray[np.uint16]] = []
    starts: list[Indices] = []
    length = 0
    end_of_text = np.array([END_OF_TEXT_ID], dtype=np.uint16)
    for index in rng.permutation(len(pieces)):
        begin, end = pieces[index]
        low, high = np.searchsorted(data.starts, (begin, end))
        starts += [np.array([length]), data.starts[low:high] - begin + length]
        part = data.tokens[begin:end]
        stream.append(part if part[-1] == END_OF_TEXT_ID else np.concatenate((part, end_of_text)))
        length += len(stream[-1])
    return np.concatenate(stream), np.concatenate(starts)


def batches(data: TokenArchive, rows: int, length: int, seed: int, device: torch.device) -> Iterator[Tensor]:
    """Endless batches of `rows` rows of `length + 1` tokens, on the device."""
    rng = np.random.default_rng(seed)
    columns = torch.arange(length + 1, device=device)
    while True:
        stream, starts = epoch_stream(data, rng)
        limit = len(stream) - length - 1
        begins = np.arange(rng.integers(length), limit, length)
        nearest = starts[np.minimum(np.searchsorted(starts, begins), len(starts) - 1)]
        begins = np.where(rng.random(len(begins)) < ALIGNED_SHARE, np.minimum(nearest, limit), begins)
        begins = rng.permutation(begins)
        on_device = torch.from_numpy(stream.astype(np.int16)).to(device)
        for first in range(0, len(begins) - rows + 1, rows):
            index = torch.from_numpy(begins[first : first + rows]).to(device)
            yield on_device[index[:, None] + columns].long()


def chunks(rows: Tensor, size: int) -> Iterator[Tensor]:
    """The rows in groups of `size`; the last may be smaller."""
    for first in range(0, len(rows), size):
        yield rows[first : first + size]


def evaluation_rows(data: TokenArchive, length: int, device: torch.device) -> Tensor:
    """The documents in their own order as rows of `length + 1` tokens; the rest is dropped."""
    count = (len(data.tokens) - 1) // length
    begins = torch.arange(count)[:, None] * length
    tokens = torch.from_numpy(data.tokens.astype(np.int64))
    return tokens[begins + torch.arange(length + 1)].to(device)
