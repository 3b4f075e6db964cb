"""The kernel benchmark measures all kernels on equal terms, and tells their errors."""

from __future__ import annotations

import csv
import json

from bench import kernels


def largest_error(name: str) -> float:
    """What rounding activations leaves of a product, as a share of the largest output."""
    if name.endswith("A8"):
        return 0.03
    return 2 * 2**-9 if "bf16" in name else 1e-3  # both factors are rounded to 8 bits of mantissa


def test_every_kernel_is_measured_and_compared(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(kernels, "SHAPES", ((128, 64),))
    monkeypatch.setattr(kernels, "ROWS", (1, 3))
    monkeypatch.setattr(kernels, "COLD_BYTES", 1 << 16)
    content = kernels.run(1, 1, tmp_path, as_json=True)
    names = [name.partition(" (")[0] for name in (row["kernel"] for row in content["kernels"])]
    assert set(names) >= {
        kernels.BASE,
        "fbgemm fp16",
        "own fp16",
        "own nf4 W4A16",
        "own nf4 W4A8",
        "own int8 W8A8",
    }
    for name, row in zip(names, content["kernels"], strict=True):
        assert row["microseconds"] > 0
        assert row["max_error"] < largest_error(name)
        assert name != kernels.BASE or row["speed_up"] == 1
    written = json.loads((tmp_path / "kernels.json").read_text())
    assert len(list(csv.DictReader((tmp_path / "kernels.csv").read_text().splitlines()))) == len(
        written["kernels"]
    )
    assert "QSpec" in capsys.readouterr().err
