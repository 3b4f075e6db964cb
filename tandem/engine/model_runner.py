"""Runs a decoder-only model over ragged batches: weights, kernels and paged cache in one place.

Knows no requests, queues or block owners: a caller brings rows and block tables, and gets logits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, Self, TypeVar

import torch

from tandem.engine.batch import Guess, SequenceRows
from tandem.engine.decoder import Batch, Decoder, load_decoder
from tandem.engine.draw import Drafted, Draw
from tandem.engine.linear import LinearChoice
from tandem.engine.native.decoder import NativeDecoder
from tandem.engine.paged_cache import PagedCache
from tandem.engine.sampler import choose, most_probable
from tandem.engine.storage import Storage
from tandem.geometry import ModelGeometry
from tandem.profiling.spans import span
from tandem.quantizations import ACTIVATION_BITS, natural_kv_dtype

WARM_UP_TOKENS = 96
P = ParamSpec("P")
T = TypeVar("T")


def _labelled(method: Callable[Concatenate[ModelRunner, P], T]) -> Callable[Concatenate[ModelRunner, P], T]:
    """Each call is a span by the runner's label."""

    @wraps(method)
    def run(self: ModelRunner, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with span(self._label):
            return method(self, *args, **kwargs)

    return run


class ModelRunner:
    """A loaded model and its cache. One thread calls `forward`; others may read and write settled blocks."""

    def __init__(
        self,
        model: Decoder,
        geometry: ModelGeometry,
        cache: PagedCache,
        linears: dict[str, LinearChoice],
        label: str = "forward",
    ) -> None:
        self.geometry = geometry
        self.cache = cache
        self.eos_token_ids = model.eos_token_ids
        self._model = model
        self._linears = linears
        self._label = label

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        dtype: str = "float32",
        kv_dtype: str = "auto",
        linear: str = "auto",
        quantization: str = "none",
        activation_bits: int = ACTIVATION_BITS,
        is_draft: bool = False,
        num_blocks: int,
        block_size: int,
        device: torch.device | str = "cpu",
        implementation: str = "auto",
    ) -> Self:
        """Open a local checkpoint; its KV is held in what it computes with unless `kv_dtype` names another.
        Raises `ConfigError` for what cannot be served."""
        torch_dtype: torch.dtype = getattr(torch, dtype)
        natural = natural_kv_dtype(quantization, activation_bits, dtype)
        held: torch.dtype = getattr(torch, natural if kv_dtype == "auto" else kv_dtype)
        geometry = ModelGeometry.from_path(path)
        storage = Storage(linear, quantization, activation_bits, is_draft)
        with torch.inference_mode():
            model = load_decoder(path, torch_dtype, storage, device, implementation)
            cache = PagedCache(geometry, num_blocks, block_size, held, device)
        return cls(model, geometry, cache, model.linears)

    def over(self, cache: PagedCache) -> ModelRunner:
        """The same weights over another runner's cache. ValueError unless its tokens have the same shape."""
        mine, theirs = self.cache.geometry, cache.geometry
        for name in ("num_layers", "num_kv_heads", "head_dim"):
            if getattr(mine, name) != getattr(theirs, name):
                raise ValueError(f"the models differ in {name}: they cannot share a cache")
        return ModelRunner(self._model, self.geometry, cache, self._linears)

    def called(self, label: str) -> ModelRunner:
        """The same weights over the same cache; profiles call its forwards so."""
        return ModelRunner(self._model, self.geometry, self.cache, self._linears, label)

    def with_activations_of(self, bits: int) -> ModelRunner:
        """The same weights over the same cache, with activations of another width where kernels can.

        4, 8 or 16 bits; 0 takes what is faster here, layer by layer. Only four-bit weights follow.
        """
        model = self._model
        if isinstance(model, NativeDecoder):
            model = model.with_activations_of(bits)
        return ModelRunner(model, self.geometry, self.cache, model.linears)

    @property
    def vocab_size(self) -> int:
        return self.geometry.vocab_size

    @property
    def device(self) -> torch.device:
        return self.cache.device

    @property
    def implementation(self) -> str:
        """What runs the forward: native, lean or transformers."""
        return self._model.implementation

    @property
    def implementation_reason(self) -> str:
        """Why that one."""
        return self._model.reason

    def linear_report(self) -> dict[str, LinearChoice]:
        """The kernel of each linear layer and why, by module name."""
        return dict(self._linears)

    def describe(self) -> str:
        """What runs here and why, on one line: the implementation, and how many layers each kernel has."""
        kernels = Counter(choice.kernel for choice in self._linears.values())
        layers = ", ".join(f"{count} {kernel}" for kernel, count in kernels.most_common())
        return f"{self.implementation} ({self.implementation_reason}): {layers}"

    def batch(self, sequences: Sequence[SequenceRows]) -> Batch:
        """Index one forward over these rows."""
        return self._model.batch(sequences, self.cache)

    @_labelled
    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        """Fill the cache with the batch's rows; `[num_logits_rows, vocab]` float32 of the rows asked for."""
        logits = self._model.forward(batch, self.cache).float()
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)  # what a forward takes is measured around it
        return logits

    @_labelled
    def choose(
        self,
        sequences: Sequence[SequenceRows],
        draws: Sequence[Draw] | None = None,
        drafted: Sequence[Drafted] | None = None,
    ) -> list[int]:
        """A forward, and a token for each row whose logits are asked for: as its draw says, or without draws
        the most probable; `NO_TOKEN` where a logit is no finite number.

        The same as `forward` and `sampler.choose`, but cheaper. Where own kernels run (`can_guess`), rows may
        be judged by speculative sampling: a row's token is the one that was `drafted` for it, or another.
        """
        if isinstance(self._model, NativeDecoder):
            return self._model.choose(sequences, draws, drafted, self.cache)
        if drafted is not None:
            raise TypeError("only own kernels judge draft tokens within the forward")
        logits = self.forward(self.batch(sequences))
        return most_probable(logits) if draws is None else choose(logits, draws)

    @property
    def can_guess(self) -> bool:
        """Whether own kernels run here, which guess and judge in one call."""
        return isinstance(self._model, NativeDecoder)

    @_labelled
    def guess(
        self,
        sequences: Sequence[SequenceRows],
        counts: Sequence[int],
        thresholds: Sequence[float],
        draws: Sequence[Draw] | None = None,
        products: Sequence[float] | None = None,
    ) -> list[Guess]:
        """At most `counts[i]` tokens after sequence i, the most probable each, in one call; or drawn, with
        `draws` [sequences] of the first token each.

        A sequence ends early where that token has a probability below `thresholds[i]`, and after a token
        with which the product of its most probable tokens' probabilities is below `products[i]`.
        """
        if not isinstance(self._model, NativeDecoder):
            raise TypeError("only own kernels guess in one call")
        products = products or [0.0] * len(counts)
        return self._model.guess(sequences, counts, thresholds, products, draws, self.cache)

    def warm_up(self) -> None:
        """Run each kind of row once, in blocks whose content no one relies on yet."""
        tokens = min(
            WARM_UP_TOKENS, self.cache.num_blocks * self.cache.block_size - 1, self.geometry.max_context - 1
        )
        table = range(-(-(tokens + 1) // self.cache.block_size))
        for start, rows in ((0, tokens // 2), (tokens // 2, tokens - tokens // 2), (tokens, 1)):
            if rows:
                self.forward(self.batch([SequenceRows([0] * rows, start, table)]))
