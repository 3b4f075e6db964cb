"""The Llama family by own C++ kernels: one call per forward, whatever rows the batch brings.

Every sum has one order, fixed by the position of a token and the index of a number and by nothing else, so
a row's bits do not depend on its batch, on how its prompt was cut, on threads, or on the instruction set.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tandem.engine.batch import Guess, SequenceRows
from tandem.engine.checkpoint import eos_token_ids
from tandem.engine.draw import Drafted, Draw, Probs
from tandem.engine.lean.config import LeanConfig
from tandem.engine.lean.rope import inverse_frequencies
from tandem.engine.lean.shapes import HEAD, tensor_shapes
from tandem.engine.lean.weights import Weights
from tandem.engine.native import build, library, packing
from tandem.engine.native.batch import NativeBatch
from tandem.engine.native.loader import Loader
from tandem.engine.paged_cache import PagedCache
from tandem.engine.rng import Stream
from tandem.engine.storage import Storage

ANGLE_PAGE = 512  # positions whose angles are added at once


class NativeDecoder:
    """A loaded model. Holds no state of a forward, so several caches and threads may share it."""

    implementation = "native"

    def __init__(self, loader: Loader, eos: frozenset[int], isa: str) -> None:
        self.reason = f"kernels for {isa}"
        self.eos_token_ids = eos
        self.linears = loader.choices
        self._loader = loader  # owns what the structs point to
        self._model = loader.model()
        self._vocab = loader.config.geometry.vocab_size
        self._width = -(-self._vocab // packing.PANEL) * packing.PANEL
        self._isa = isa
        self._inv_freq = inverse_frequencies(loader.config.rope, loader.config.geometry.head_dim).double()
        self._angles = _Angles(torch.empty(0, 2, loader.config.geometry.head_dim // 2))

    @classmethod
    def load(cls, path: Path, config: LeanConfig, raw: dict[str, Any], stored: Storage) -> NativeDecoder:
        """Open a checkpoint whose config was parsed, where the kernels can run.

        Raises `ConfigError` for weights that do not fit it, or kernels that fail their check.
        """
        isa = build.instruction_set()
        library.load(isa)
        with Weights(path) as weights:
            weights.check(dict(tensor_shapes(config)), frozenset({HEAD}) if config.tied else frozenset())
            eos = eos_token_ids(path, raw, config.architecture.eos_token_id)
            return cls(Loader(config, weights, stored), eos, isa)

    def with_activations_of(self, bits: int) -> NativeDecoder:
        """The same four-bit weights, multiplied with activations of another width: 4, 8, 32, or 0 for what
        is faster here, layer by layer."""
        twin = copy(self)
        twin._model, twin.linears = self._loader.twin(self._isa, bits)
        return twin

    def batch(self, sequences: Sequence[SequenceRows], cache: PagedCache) -> NativeBatch:
        """Index one forward over these rows."""
        return NativeBatch.build(sequences, cache.block_size, cache.num_blocks)

    def forward(self, batch: NativeBatch, cache: PagedCache) -> torch.Tensor:
        """Fill the cache and return `[num_logits_rows, vocab]` float32."""
        angles, logits = self._reach(batch), torch.empty(batch.num_logits, self._width)
        engine = library.engine(self._isa)
        engine.forward(self._model, cache.for_kernels, batch.numbers, angles.address, logits.data_ptr())
        return logits[:, : self._vocab]

    def choose(
        self,
        sequences: Sequence[SequenceRows],
        draws: Sequence[Draw] | None,
        drafted: Sequence[Drafted] | None,
        cache: PagedCache,
    ) -> list[int]:
        """A forward, and a token for each row whose logits are asked for: as its draw says, or the most
        probable, the first of several; -1 where a logit is no finite number. With `drafted` by speculative
        sampling: the draft's token of the row, or another in its place."""
        batch = self.batch(sequences, cache)
        angles, chosen = self._reach(batch), array("i", bytes(4 * batch.num_logits))
        packed = None if draws is None else library.pack_draws(draws)
        judged = None if drafted is None else library.pack_drafted(drafted)
        engine, memory = library.engine(self._isa), cache.for_kernels
        engine.forward(self._model, memory, batch.numbers, angles.address, None, chosen, packed, judged)
        return chosen.tolist()

    def guess(
        self,
        sequences: Sequence[SequenceRows],
        counts: Sequence[int],
        thresholds: Sequence[float],
        products: Sequence[float],
        draws: Sequence[Draw] | None,
        cache: PagedCache,
    ) -> list[Guess]:
        """The tokens after each sequence, one forward per depth, all in one call: the most probable ones, or
        drawn, `draws` [sequences] being those of the first token.

        At most `counts[i]` (1 or more) for sequence i, fewer where the most probable token has a probability
        below `thresholds[i]`, or after one with which the product of these probabilities is below
        `products[i]`. A draft's own draws come with their distributions. ValueError where the blocks
        do not hold all of them but the last.
        """
        num, most, size = len(sequences), max(counts), cache.block_size
        batch = NativeBatch.build(sequences, size, cache.num_blocks, most - 1)
        for s, count in zip(sequences, counts, strict=True):
            if s.start + len(s.token_ids) + count - 1 > len(s.block_table) * size:
                raise ValueError("the guesses do not fit in their blocks")
        angles, engine = self._reach(batch), library.engine(self._isa)
        wanted = array("i", counts), array("f", thresholds), array("f", products)
        packed = None if draws is None else library.pack_draws(draws)
        is_judged = [draw.stream == Stream.DRAFT for draw in draws or ()]
        probs = np.empty((num, most, self._vocab), np.float32) if any(is_judged) else None
        address = None if probs is None else probs.ctypes.data
        memory = cache.for_kernels
        found = engine.guess(self._model, memory, batch.numbers, angles.address, *wanted, packed, address)
        drawn = [() if probs is None or not is_judged[i] else probs[i] for i in range(num)]
        return _guesses(found, num, most, drawn)

    def _reach(self, batch: NativeBatch) -> _Angles:
        """Of all positions of a batch, whose tokens are checked on the way; whoever uses them holds them."""
        if batch.lowest_token < 0 or batch.highest_token >= self._vocab:
            raise ValueError(f"token ids must be in [0, {self._vocab})")
        angles = self._angles
        if angles.num_positions < batch.num_positions:
            angles = self._angles = angles.up_to(batch.num_positions, self._inv_freq)
        return angles


class _Angles:
    """Cosines and sines `[positions, 2, dim / 2]` of the first positions, and where they lie."""

    __slots__ = ("_values", "address", "num_positions")

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values
        self.address = values.data_ptr()
        self.num_positions = len(values)

    def up_to(self, num_positions: int, inv_freq: torch.Tensor) -> _Angles:
        """These and more, by whole pages."""
        stop = -(-num_positions // ANGLE_PAGE) * ANGLE_PAGE
        # In double precision, so that every libm rounds to the same floats. Not by torch, which is now
        # and then off by 7e-9 in its first call on several busy cores: each process would have its own bits.
        angles = (torch.arange(self.num_positions, stop).double()[:, None] * inv_freq).numpy()
        turned = np.stack((np.cos(angles), np.sin(angles)), 1).astype(np.float32)
        return _Angles(torch.cat((self._values, torch.from_numpy(turned))))


def _guesses(found: array[int], num: int, most: int, drawn: Sequence[Sequence[Probs]]) -> list[Guess]:
    """As `Engine.guess` lays them out; `drawn` [num] has at least as many as there are tokens, or none."""
    guesses = []
    for i in range(num):
        count, is_unsure = found[num * most + i], found[num * (most + 1) + i]
        token_ids = found[i * most : i * most + count].tolist()
        guesses.append(Guess(token_ids, bool(is_unsure), list(drawn[i][:count])))
    return guesses
