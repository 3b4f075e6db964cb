"""What the sampler must remember of one sequence: its parameters and the tokens so far.

Knows nothing of batches or of how a token is drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from tandem.engine.draw import Draw
from tandem.engine.rng import SEED_BITS, Stream
from tandem.sampling import SamplingParams


class SamplingState:
    """Parameters, seed and token history of one sequence. Counts are kept only where a penalty needs them.

    `append` a token that was chosen, `rollback` the last ones that were not: what remains is as if they
    had never been there, so a verifier can walk along draft tokens.
    """

    def __init__(
        self,
        params: SamplingParams,
        seed: int,
        prompt_ids: Sequence[int],
        vocab_size: int,
        eos_token_ids: Iterable[int] = (),
        output_ids: Sequence[int] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        self.params = params
        self.seed = seed
        self.vocab_size = vocab_size
        self.output_ids: list[int] = []
        self.stop_ids = torch.tensor(
            sorted({*eos_token_ids, *params.stop_token_ids}), dtype=torch.int64, device=device
        )
        self.bias_ids = torch.tensor(list(params.logit_bias), dtype=torch.int64, device=device)
        self.biases = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device)
        self.prompt_counts: torch.Tensor | None = None  # [vocab] float32
        self.output_counts: torch.Tensor | None = None  # [vocab] float32
        if params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty:
            ids = torch.tensor(prompt_ids, dtype=torch.int64, device=device)
            self.prompt_counts = torch.bincount(ids, minlength=vocab_size).float()
            self.output_counts = torch.zeros_like(self.prompt_counts)
        self.extend(output_ids)

    @property
    def position(self) -> int:
        """Index of the next output token; with the seed it keys the random numbers."""
        return len(self.output_ids)

    def draw(self, ahead: int = 0, stream: Stream = Stream.TOKEN) -> Draw:
        """Of the output token `ahead` of the next one."""
        params, position = self.params, len(self.output_ids) + ahead
        filters = params.top_p, params.min_p, params.top_k
        return Draw(self.seed & SEED_BITS, position, stream, params.temperature, *filters)

    def append(self, token_id: int) -> None:
        self.output_ids.append(token_id)
        if self.output_counts is not None:
            self.output_counts[token_id] += 1

    def extend(self, token_ids: Sequence[int]) -> None:
        """Several, in order."""
        self.output_ids += token_ids
        if self.output_counts is not None:
            for token_id in token_ids:
                self.output_counts[token_id] += 1

    def rollback(self, num_tokens: int) -> None:
        """Forget the last `num_tokens` output tokens."""
        for _ in range(num_tokens):
            token_id = self.output_ids.pop()
            if self.output_counts is not None:
                self.output_counts[token_id] -= 1
