"""What others report for the same tasks, each with its setting. Models and machines differ from ours."""

from __future__ import annotations

from dataclasses import dataclass

HPML = "Columbia HPML 2025"
QSPEC = "QSpec (Zhao et al.)"


@dataclass(frozen=True, slots=True)
class Published:
    """One figure, or some that belong together."""

    task: str
    source: str
    model: str
    setting: str
    figure: str


PUBLISHED = (
    Published("HumanEval", HPML, "Llama-3 8B, 4/8/16-bit", "greedy", "0.292 / 0.323 / 0.336"),
    Published("HumanEval", HPML, "Llama-3 8B, 4/8/16-bit", "T 0.7, top_p 0.95", "0.317 / 0.329 / 0.329"),
    Published("HumanEval", QSPEC, "W4A16 / QSpec / W4A4", "greedy, Atom", "0.524 / 0.524 / 0.317"),
    Published("HumanEval", QSPEC, "W4A16 / QSpec / W4A4", "greedy, QuaRot", "0.457 / 0.476 / 0.280"),
    Published("MBPP", QSPEC, "W4A16 / QSpec / W4A4", "greedy, Atom", "0.415 / 0.390 / 0.305"),
    Published("GSM8K", QSPEC, "W4A16 / QSpec / W4A4", "greedy, Atom", "0.734 / 0.734 / 0.547"),
    Published("GSM8K", QSPEC, "W4A16 / QSpec / W4A4", "greedy, QuaRot", "0.705 / 0.710 / 0.420"),
    Published(
        "WikiText", HPML, "Llama-3 8B, 16/8/4-bit", "stride 512, at most 2,048", "5.563 / 5.640 / 6.242"
    ),
    Published("WikiText", QSPEC, "W4A16 / QSpec / W4A4", "WikiText-2, Atom", "7.87 / 7.87 / 8.6"),
    Published("WikiText", QSPEC, "W4A16 / QSpec / W4A4", "WikiText-2, QuaRot", "8.58 / 8.58 / 10.2"),
)


def published(task: str) -> list[Published]:
    """Figures of one task, by its name."""
    return [one for one in PUBLISHED if one.task == task]
