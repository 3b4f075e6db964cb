"""How busy decoding kept the hardware: processor time of this process, or what NVML says of a GPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from tandem.errors import ConfigError

T = TypeVar("T")
PERIOD_S = 0.05  # between two looks at a GPU, whose driver averages over a sixth of a second and more
CPU, GPU = (
    "Utilization: processor time of the worker's process over wall time and threads; far below 100 % others "
    "computed at the same time.",
    "Utilization: share of the time in which the GPU ran a kernel, of this process or another, by NVML.",
)


def remark(device: str) -> str:
    """What the column of tables says."""
    return CPU if device == "cpu" else GPU


def check(device: str) -> None:
    """Raises `ConfigError` where NVML cannot be asked for a GPU."""
    if device == "cpu":
        return
    try:
        torch.cuda.utilization(device)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"utilization of {device} is NVML's, and its Python package is missing: pip install nvidia-ml-py"
        ) from error
    except Exception as error:  # whatever the driver says, a GPU in parts (MIG) among it
        raise ConfigError(f"NVML tells no utilization of {device}: {error}") from error


def watched(work: Callable[[], T], device: str, threads: int) -> tuple[T, float]:
    """What `work` returns, and the share of the hardware that it used: of all threads, or of the GPU."""
    if device == "cpu":
        began_s, used_s = time.perf_counter(), time.process_time()
        result = work()
        used_s = time.process_time() - used_s
        return result, used_s / (time.perf_counter() - began_s) / threads
    with _Watch(device) as watch:
        result = work()
    return result, watch.share


class _Watch:
    """Looks at a GPU in a thread of its own, until the block ends."""

    def __init__(self, device: str) -> None:
        self._device, self._over = device, threading.Event()
        self._looks: list[int] = []  # percents
        self._thread = threading.Thread(target=self._run, name="nvml", daemon=True)

    @property
    def share(self) -> float:
        """Mean of all looks."""
        return sum(self._looks) / len(self._looks) / 100

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        """Once at the end, however short the work."""
        while not self._over.wait(PERIOD_S):
            self._looks.append(torch.cuda.utilization(self._device))
        self._looks.append(torch.cuda.utilization(self._device))
