"""A device that is not the CPU, for machines that have none: what is there and what is here must not meet.

Tensors on it are ordinary ones in a wrapper that says `meta`, a device of torch's that needs no driver. An
operation on both kinds is refused as it is with a GPU, and so is looking at their memory. The numbers are
those of the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}
TAKE_INDICES_FROM_HERE = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}


class There(torch.Tensor):
    """A tensor on the pretended device."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> There:
        made: There = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def data_ptr(self) -> int:
        return 0

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


@contextmanager
def pretended() -> Iterator[torch.device]:
    """Until the block ends tensors can be made on `DEVICE`, by this thread."""
    with _Operations(), _Constants():
        yield DEVICE


class _Constants(TorchFunctionMode):
    """What torch puts onto a device without an operation: the content of lists."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and kwargs.get("device") is not None:
            return torch.tensor(*args, **kwargs | {"device": "cpu"}).to(kwargs["device"])
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[1], list):
            args = args[0], torch.tensor(args[1]), *args[2:]
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """All others."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._can_decompose():  # in inference mode these come whole, and name devices in many ways
            with self:
                return func.decompose(*args, **(kwargs or {}))
        return run(func, args, kwargs or {})


@torch.inference_mode(False)  # whose tensors know nothing of views of wrappers
@torch.no_grad()
def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on what the wrappers hold. RuntimeError if it has operands from both places."""
    if func is aten._has_compatible_shallow_copy_type.default:
        return False  # a module's parameters are made anew as it moves
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    there = [value for value in tensors if isinstance(value, There)]
    here = [value for value in tensors if not isinstance(value, There) and value.dim()]
    if there and here and func not in MOVES and not (func in TAKE_INDICES_FROM_HERE and args[0] in there):
        raise RuntimeError(f"{func} has operands on {DEVICE} and on the CPU")
    wanted = kwargs.get("device")
    is_there = bool(there) if wanted is None else torch.device(wanted).type == DEVICE.type
    if func is aten.copy_.default:
        is_there = isinstance(args[0], There)
    if wanted is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
    out = func(*inner_args, **inner_kwargs)
    if func is aten._to_copy.default and out is inner_args[0]:
        out = out.clone()
    if not is_there:
        return out
    out = tree_map(lambda value: There(value) if isinstance(value, torch.Tensor) else value, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if there else out


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, There) else value
