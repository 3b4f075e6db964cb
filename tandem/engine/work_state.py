"""Between a work order and the sampler: the state to sample with, and the log-probabilities to report."""

from __future__ import annotations

from tandem.engine.model_runner import ModelRunner
from tandem.engine.sampler import SampledToken
from tandem.engine.sampling_state import SamplingState
from tandem.output import TokenLogprobs
from tandem.work import Work


def sampling_state(work: Work, model: ModelRunner) -> SamplingState:
    """A state that has seen the prompt and the output tokens already delivered."""
    return SamplingState(
        work.sampling,
        work.seed,
        work.token_ids[: work.num_prompt_tokens],
        model.vocab_size,
        model.eos_token_ids if not work.sampling.ignore_eos else (),
        work.token_ids[work.num_prompt_tokens :],
        model.device,
    )


def logprobs_of(token: SampledToken) -> TokenLogprobs | None:
    """What to report with the token; None unless the request asked for it."""
    return None if token.logprob is None else TokenLogprobs(token.logprob, token.top)
