"""Which models run: a section of the settings. See tandem/config.py."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tandem.config_values import check
from tandem.geometry import DTYPE_BYTES
from tandem.quantizations import parse_quantization

IMPLEMENTATIONS = ("auto", "native", "lean", "transformers")
BUNDLED_MODELS = Path(__file__).parent / "models"
DEVICE = re.compile("cpu|cuda(:[0-9]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which checkpoint to serve. `path` is a folder; the hub is asked only by `deploy`."""

    path: Path = BUNDLED_MODELS / "target"
    name: str = ""  # what clients call it; the folder's name by default
    device: str = "cpu"  # that workers compute on: cpu, cuda, or one of several as cuda:1
    dtype: str = "float32"  # of activations, and of KV unless `cache` says otherwise
    implementation: str = "auto"  # auto | native | lean | transformers (tandem.engine.implementation)
    quantization: str = "none"  # of linear weights (tandem.quantizations); the output head stays whole
    linear: str = "auto"  # auto | fp32 | fp16: storage of linear weights on a CPU (tandem.engine.linear)

    def __post_init__(self) -> None:
        check(
            DEVICE.fullmatch(self.device) is not None,
            f"model device must be cpu, cuda or cuda:0, …, not {self.device}",
        )
        check(
            self.dtype in DTYPE_BYTES,
            f"model dtype must be one of {', '.join(DTYPE_BYTES)}, not {self.dtype}",
        )
        check(
            self.implementation in IMPLEMENTATIONS,
            f"model implementation must be one of {', '.join(IMPLEMENTATIONS)}, not {self.implementation}",
        )
        parse_quantization(self.quantization)
        check(
            self.linear in ("auto", "fp32", "fp16"),
            f"model linear must be auto, fp32 or fp16, not {self.linear}",
        )

    @property
    def device_type(self) -> str:
        """The device without its number."""
        return self.device.partition(":")[0]

    @property
    def served_name(self) -> str:
        return self.name or ("tandem-8m" if self.path == BUNDLED_MODELS / "target" else self.path.name)
