"""Ways of decoding the same samples, in turns: speed, acceptance, rollbacks and utilization.

Samples are decoded in some rounds of different samples each, every arm on all of them. Decoding alone is
timed; prompts are prefilled before.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from bench.eval.experiment import Settings
from bench.eval.utilization import watched
from bench.inflate import Pair
from bench.measure import Spread, interleave
from bench.speculation.rig import EXACT, Rig, Run, Setup
from bench.speculation.text import Tokens, batches
from decode_worker.decoder import Decoder
from tandem.sampling import SamplingParams
from tandem.speculation import SpeculationParams, SpeculationPolicy

K = TypeVar("K", bound=Hashable)
PROMPT_TOKENS = OUTPUT_TOKENS = 128
TEMPERATURE = 0.7  # of sampling
AT_ONCE = 32  # samples whose KV is kept


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of decoding."""

    rig: Rig
    decoder: Decoder
    asked: SpeculationParams = EXACT

    @classmethod
    def of(cls, rig: Rig, k: int, tau: float) -> Arm:
        """Always k draft tokens unless the draft is less sure than tau; plain decoding where k is 0.

        Samples are accepted by speculative sampling.
        """
        asked = SpeculationParams(
            policy=SpeculationPolicy.AUTO,
            num_assistant_tokens=k or None,
            assistant_confidence_threshold=tau,
        )
        return cls(rig, rig.constant, asked) if k else cls(rig, rig.plain)


@dataclass(slots=True)
class Outcome:
    """What an arm did with the samples of each round."""

    runs: list[Run] = field(default_factory=list)
    busy_s: float = 0.0  # of the hardware: time of each run by the share that was used

    @property
    def total(self) -> Run:
        """All rounds as one."""
        return Run.total(self.runs)

    @property
    def rates(self) -> list[float]:
        """Output tokens per second, by round."""
        return [run.tokens_per_s for run in self.runs]

    @property
    def utilization(self) -> float:
        """Of the threads, or of the GPU."""
        return self.busy_s / self.total.seconds


@dataclass(frozen=True, slots=True)
class Row:
    """One way of decoding all samples, against unquantized plain decoding of the same."""

    pair: str
    draft_precision: str
    target_precision: str
    sampling: str  # greedy | sampled
    k: int  # 0 is plain decoding
    tau: float
    samples: int
    tokens_per_s: float
    ms_per_token: float
    rollbacks: int  # steps in which a draft token was rejected, of all samples
    acceptance_rate: float  # accepted of drafted tokens
    alpha: float  # accepted of judged tokens
    speedup: Spread  # within rounds
    utilization: float
    identical: bool | None  # to the baseline's tokens; None where they need not be


def rig_of(settings: Settings, pair: Pair, setup: Setup, samples: int) -> Rig:
    """With room for so many samples and what is decoded of them."""
    tokens = PROMPT_TOKENS + OUTPUT_TOKENS
    return Rig(pair, setup, samples, tokens, settings.threads, settings.device)


def sampling_params(sampling: str) -> SamplingParams:
    """Of `greedy` and of `sampled`; a sample's seed is its number in its round."""
    temperature = TEMPERATURE if sampling == "sampled" else 0.0
    return SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True, temperature=temperature)


def per_round(samples: int, batch: int, rounds: int) -> int:
    """Samples of a round: whole batches, as few rounds as memory allows and as many as asked for."""
    wanted = -(-samples // rounds)
    return max(batch, min(AT_ONCE, wanted) // batch * batch)


def measure(
    arms: Mapping[K, Arm],
    samples: Sequence[Tokens],
    batch: int,
    sampling: SamplingParams,
    rounds: int,
    after: Callable[[], None],
) -> dict[K, Outcome]:
    """All arms on all samples. `after` is called `num_runs` times."""
    outcomes = {name: Outcome() for name in arms}

    def run(name: K, some: Sequence[Tokens]) -> tuple[Run, float]:
        arm = arms[name]
        decode = partial(arm.rig.run, arm.decoder, some, batch, sampling, arm.asked)
        found = watched(decode, arm.rig.device, arm.rig.threads)
        after()
        return found

    rigs = {id(arm.rig): arm.rig for arm in arms.values()}.values()
    for number, some in enumerate(batches(samples, per_round(len(samples), batch, rounds))):
        for rig in rigs:
            rig.prefill(some)
        if number == 0:
            for name in arms:
                run(name, some[:batch])  # caches warm
        names = list(arms) if number % 2 == 0 else list(arms)[::-1]
        found = interleave({name: partial(run, name, some) for name in names}, 1, warm_ups=0)
        for name, [(result, share)] in found.items():
            outcomes[name].runs.append(result)
            outcomes[name].busy_s += share * result.seconds
    return outcomes


def num_runs(num_arms: int, samples: int, batch: int, rounds: int) -> int:
    """How often `measure` runs a decoder, warm-ups included."""
    return num_arms * (1 + -(-samples // per_round(samples, batch, rounds)))
