"""Figures that others have published, with their setting. Hardware and models differ: compare ratios."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

SPECULATION_SETTING = (
    "Published: Llama-3 8B, drafts of 1B and 3B, on an NVIDIA L4 of 24 GB (Columbia HPML 2025): WikiText-2 "
    "test, 500 samples of 128 tokens, 128 new tokens, 16-bit baseline of 15.5 tokens/s; 8- and 4-bit by "
    "bitsandbytes."
)
QUANTIZATION_SETTING = (
    "Published: Llama-3 8B on an NVIDIA L4 (Columbia HPML 2025), 200 prompts; perplexity of WikiText-2 with "
    "stride 512 and windows of 2,048 tokens."
)

GAMMA_SETTING = (
    "Published (CMU 11-664/763, autumn 2025): transformers on an A100 of 80 GB, where all three pairs lost. "
    "Its α falls with γ, as our acceptance does."
)
FORWARD_SETTING = (
    "Published (CMU 11-664/763, autumn 2025) on an A100 of 80 GB: forwards of Qwen3 4B at S = 256; outputs "
    "of Qwen3 8B at batch 8, 64 new tokens, or 64 tokens in; Llama 3.1 8B with and without a cache on a "
    "prompt of 32k tokens."
)
QSPEC_SETTING = (
    "Published (QSpec, Zhao et al.): A100 of 40 GB, Atom's kernels, γ = 3, greedy, means over six datasets; "
    "fidelity of Atom's formats. Its latencies replay traces of emulated quantization on real kernels."
)


@dataclass(frozen=True, slots=True)
class Speculated:
    """Speculation by transformers' assisted generation. The 3B draft's utilization is of whole percents."""

    draft: str
    tau: float
    sampling: str
    k: int
    tokens_per_s: float
    ms_per_token: float
    rollbacks: int
    acceptance_rate: float
    speedup: float
    gpu_percent: float


@dataclass(frozen=True, slots=True)
class QuantizedPair:
    """k = 3, τ = 0.2, greedy; speed-up over the 16-bit target alone."""

    draft: str
    draft_precision: str
    target_precision: str
    acceptance_rate: float
    speedup: float


@dataclass(frozen=True, slots=True)
class Quantized:
    """A target alone."""

    bits: int
    tokens_per_s: float
    perplexity: float
    gpu_percent: float


@dataclass(frozen=True, slots=True)
class Gamma:
    """Speculation at batch 1 with γ draft tokens per step."""

    pair: str
    gamma: int
    speedup: float
    alpha_percent: float


@dataclass(frozen=True, slots=True)
class QSpec:
    """QSpec over W4A16 at a batch size."""

    model: str
    batch: int
    speedup: float


@dataclass(frozen=True, slots=True)
class Fidelity:
    """One figure of W4A16, QSpec and W4A4."""

    formats: str
    figure: str
    w4a16: float
    qspec: float
    w4a4: float


SPECULATION = (
    Speculated("1B", 0.0001, "greedy", 3, 19.995, 50.013, 2502, 0.547, 1.301, 89.08),
    Speculated("1B", 0.0001, "greedy", 5, 18.653, 53.611, 2700, 0.440, 1.214, 86.79),
    Speculated("1B", 0.0001, "greedy", 7, 16.696, 59.896, 2796, 0.363, 1.086, 72.30),
    Speculated("1B", 0.0001, "sampled", 3, 19.833, 50.420, 2491, 0.549, 1.290, 89.88),
    Speculated("1B", 0.0001, "sampled", 5, 18.226, 54.866, 2785, 0.431, 1.186, 76.08),
    Speculated("1B", 0.0001, "sampled", 7, 16.510, 60.570, 2863, 0.361, 1.074, 73.84),
    Speculated("1B", 0.2, "greedy", 3, 20.769, 48.150, 2428, 0.609, 1.351, 81.27),
    Speculated("1B", 0.2, "greedy", 5, 20.535, 48.697, 2606, 0.544, 1.336, 76.91),
    Speculated("1B", 0.2, "greedy", 7, 20.334, 49.178, 2653, 0.500, 1.323, 77.06),
    Speculated("1B", 0.2, "sampled", 3, 20.425, 48.960, 2353, 0.605, 1.329, 79.97),
    Speculated("1B", 0.2, "sampled", 5, 19.385, 51.585, 2550, 0.490, 1.261, 76.61),
    Speculated("1B", 0.2, "sampled", 7, 19.152, 52.215, 2657, 0.480, 1.246, 75.21),
    Speculated("3B", 0.2, "greedy", 3, 17.099, 58.5, 1967, 0.673, 1.112, 88),
    Speculated("3B", 0.2, "greedy", 5, 16.580, 60.3, 2116, 0.610, 1.079, 93),
    Speculated("3B", 0.2, "greedy", 7, 15.928, 62.8, 2194, 0.559, 1.036, 93),
    Speculated("3B", 0.2, "sampled", 3, 16.794, 59.5, 1985, 0.660, 1.093, 91),
    Speculated("3B", 0.2, "sampled", 5, 16.324, 61.3, 2055, 0.605, 1.062, 91),
    Speculated("3B", 0.2, "sampled", 7, 15.475, 64.6, 2170, 0.556, 1.010, 90),
)
QUANTIZED_PAIRS = (
    QuantizedPair("1B", "none", "none", 0.609, 1.351),
    QuantizedPair("1B", "int8", "none", 0.602, 0.834),
    QuantizedPair("1B", "nf4", "none", 0.539, 0.938),
    QuantizedPair("1B", "none", "int8", 0.601, 0.954),
    QuantizedPair("1B", "nf4", "int8", 0.537, 0.717),
    QuantizedPair("3B", "none", "none", 0.673, 1.112),
    QuantizedPair("3B", "int8", "none", 0.663, 0.609),
    QuantizedPair("3B", "nf4", "none", 0.637, 0.691),
    QuantizedPair("3B", "none", "int8", 0.661, 0.833),
    QuantizedPair("3B", "nf4", "int8", 0.634, 0.560),
)
QUANTIZATION = (
    Quantized(16, 15.499, 5.563, 97.97),
    Quantized(8, 9.028, 5.640, 48.93),
    Quantized(4, 21.036, 6.242, 70.37),
)
GAMMA = tuple(
    Gamma(pair, gamma, speedup, alpha)
    for pair, speedups, alphas in (
        ("Qwen3 8B + 0.6B", (0.52, 0.54, 0.51, 0.47), (68.5, 62.0, 52.5, 46.7)),
        ("Qwen3 8B + 1.7B", (0.52, 0.56, 0.55, 0.53), (75.2, 70.9, 59.1, 53.6)),
        ("Llama 3.1 8B + 1B", (0.52, 0.60, 0.64, 0.64), (70.0, 68.0, 58.1, 53.1)),
    )
    for gamma, speedup, alpha in zip((2, 3, 5, 7), speedups, alphas, strict=True)
)
QSPEC = tuple(
    QSpec(model, batch, speedup)
    for model, speedups in (
        ("3B", (1.50, 1.24, 1.23)),
        ("Llama 2 7B", (1.57, 1.33, 1.31)),
        ("Llama 3 8B", (1.48, 1.25, 1.20)),
        ("13B", (1.71, 1.45, 1.31)),
    )
    for batch, speedup in zip((8, 16, 32), speedups, strict=True)
)
FIDELITY = (
    Fidelity("Atom", "WikiText-2 perplexity", 7.87, 7.87, 8.6),
    Fidelity("Atom", "GSM8K", 73.4, 73.4, 54.7),
    Fidelity("Atom", "MATH", 24.3, 24.3, 15.5),
    Fidelity("Atom", "MBPP", 41.5, 39.0, 30.5),
    Fidelity("Atom", "HumanEval", 52.4, 52.4, 31.7),
    Fidelity("QuaRot", "WikiText-2 perplexity", 8.58, 8.58, 10.2),
    Fidelity("QuaRot", "GSM8K", 70.5, 71.0, 42.0),
    Fidelity("QuaRot", "HumanEval", 45.7, 47.6, 28.0),
)


FORWARD_MS = {1: 38.7, 2: 40.7, 4: 59.1, 8: 111.3, 16: 213.9}  # by batch, at S = 256
INPUT_S = {1: 2.50, 256: 2.40, 4096: 2.72, 16384: 3.70, 32768: 5.10}  # by prompt tokens, 64 new ones
OUTPUT_S = {1: 0.045, 4: 0.162, 16: 0.615, 64: 2.43, 256: 9.94}  # by new tokens
CACHED_S, UNCACHED_S = 4.6, 120.0  # 32 new tokens


def cells(found: Iterator[Speculated | QuantizedPair]) -> tuple[str, ...]:
    """Speed-up and acceptance with the 1B and with the 3B draft; a dash for what was not published."""
    by_draft = {row.draft: row for row in found}
    drafts = (by_draft.get("1B"), by_draft.get("3B"))
    return tuple(f"{row.speedup:.2f}x, {row.acceptance_rate:.0%}" if row else "–" for row in drafts)
