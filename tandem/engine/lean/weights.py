"""Tensors of a checkpoint by name, from memory-mapped safetensors files, checked before any is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from tandem.engine.quantization.bitsandbytes import dequantize, is_part, is_quantized
from tandem.errors import ConfigError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
IGNORED = ("rotary_emb.inv_freq",)  # old checkpoints carry what config.json already says
FLOATS = ("F32", "F16", "BF16", "F64")
NAMES_SHOWN = 5


class Weights:
    """Open safetensors files of one checkpoint. What is float32 already is not copied."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack = ExitStack()
        self._file_of: dict[str, Any] = {}
        self._shapes: Mapping[str, tuple[int, ...]] = {}
        try:
            for file in _files(path):
                handle = self._stack.enter_context(safe_open(file, framework="pt"))
                self._file_of.update(dict.fromkeys(handle.keys(), handle))
        except (OSError, SafetensorError) as error:
            self._stack.close()
            raise ConfigError(f"the weights in {path} cannot be read: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def check(self, shapes: Mapping[str, tuple[int, ...]], optional: frozenset[str] = frozenset()) -> None:
        """Refuse a checkpoint whose tensors are not exactly these, by name."""
        self._shapes = shapes
        known = {name for name in self._file_of if not (name.endswith(IGNORED) or is_part(name))}
        self._refuse("lacks", sorted(shapes.keys() - known))
        self._refuse("has unexpected", sorted(known - shapes.keys() - optional))
        wrong = []
        for name, shape in shapes.items():
            if is_quantized(name, self._file_of):
                continue  # checked when it is read
            header = self._file_of[name].get_slice(name)
            if tuple(header.get_shape()) != shape or header.get_dtype() not in FLOATS:
                wrong.append(f"{name} ({header.get_dtype()} {header.get_shape()} instead of {list(shape)})")
        self._refuse("has misshapen", wrong)

    def get(self, name: str) -> torch.Tensor:
        """The tensor in float32; a weight that bitsandbytes quantized as the numbers it stands for."""
        if not is_quantized(name, self._file_of):
            return self._read(name).float()
        weight = dequantize(name, self._file_of, self._read)
        shape = self._shapes.get(name, tuple(weight.shape))
        if tuple(weight.shape) != shape:
            self._refuse("has misshapen", [f"{name} ({list(weight.shape)} instead of {list(shape)})"])
        return weight

    def _read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file_of[name].get_tensor(name)
        return tensor

    def _refuse(self, what: str, names: list[str]) -> None:
        if names:
            more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
            raise ConfigError(f"{self._path} {what} tensors: {', '.join(names[:NAMES_SHOWN])}{more}")


def _files(path: Path) -> list[Path]:
    """The checkpoint's files; one that the index names must lie in the folder itself."""
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    try:
        names = sorted(set(json.loads((path / INDEX).read_text())["weight_map"].values()))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} has neither {SINGLE} nor {INDEX}") from error
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path / INDEX} is not an index of safetensors files: {error!r}") from error
    strange = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    if strange:
        raise ConfigError(f"{path / INDEX} names {strange[0]}, which is no safetensors file of the folder")
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise ConfigError(f"{path} lacks {', '.join(missing)}, which {INDEX} names")
    return [path / name for name in names]
