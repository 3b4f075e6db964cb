"""The C++ kernels as Python sees them."""

from __future__ import annotations

import ctypes
import struct
import threading
from array import array
from collections.abc import Sequence
from functools import cache

import torch

from tandem.engine.draw import Drafted, Draw
from tandem.engine.native import build
from tandem.engine.native.packing import BF16, PANEL, PackedLinear, pack_bf16, pack_linear
from tandem.engine.native.structs import Cache, Model
from tandem.errors import ConfigError

ABI = 14
CHECK_TOLERANCE = 1e-5


class Engine:
    """A team of threads and the buffers of one forward. One call at a time."""

    def __init__(self, library: ctypes.CDLL, threads: int) -> None:
        self._library = library
        self._handle: int | None = library.tandem_engine_new(threads)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.tandem_engine_delete(self._handle)
            self._handle = None

    def forward(
        self,
        model: Model,
        cache: Cache,
        batch: array[int],
        angles: int,
        logits: int | None = None,
        chosen: array[int] | None = None,
        draws: bytes | None = None,
        drafted: bytes | None = None,
    ) -> None:
        """Fill the cache, and `logits` (an address) and `chosen` if given. Other threads run meanwhile."""
        self._library.tandem_forward(
            self._handle,
            ctypes.byref(model),
            ctypes.byref(cache),
            _address(batch),
            angles,
            logits,
            None if chosen is None else _address(chosen),
            draws,
            drafted,
        )

    def guess(
        self,
        model: Model,
        cache: Cache,
        batch: array[int],
        angles: int,
        counts: array[int],
        thresholds: array[float],
        products: array[float],
        draws: bytes | None,
        probs: int | None,
    ) -> array[int]:
        """Forward by forward a token each: `[sequences, most]` ids with room for the largest of `counts`,
        then how many were found for each sequence, then 1 for each that is unsure. `probs` is the address of
        `[sequences, most, vocab]` floats for what draft tokens are drawn from."""
        most = max(counts)
        found = array("i", bytes(4 * len(counts) * (most + 2)))
        self._library.tandem_guess(
            self._handle,
            ctypes.byref(model),
            ctypes.byref(cache),
            _address(batch),
            angles,
            most,
            _address(counts),
            _address(thresholds),
            _address(products),
            draws,
            _address(found),
            probs,
        )
        return found

    def linear(self, packed: PackedLinear, x: torch.Tensor) -> torch.Tensor:
        """`x` [rows, in] float32 contiguous → [rows, out] float32."""
        width = -(-packed.out_features // PANEL) * PANEL
        y = torch.empty(x.shape[0], width)
        self._library.tandem_linear(
            self._handle, ctypes.byref(packed.struct), x.data_ptr(), x.shape[0], y.data_ptr()
        )
        return y[:, : packed.out_features]


def _address(numbers: array[int] | array[float]) -> int:
    return numbers.buffer_info()[0]


def pack_draws(draws: Sequence[Draw]) -> bytes:
    """Behind each other, as `choose` and `Engine.forward` take them."""
    return b"".join([_DRAW.pack(*draw) for draw in draws])


def pack_drafted(drafted: Sequence[Drafted]) -> bytes:
    """Behind each other, as `Engine.forward` takes them; the distributions must live as long."""
    return b"".join([_DRAFTED.pack(i, 0 if probs is None else probs.ctypes.data) for i, probs in drafted])


def choose(isa: str, logits: torch.Tensor, draws: bytes, *, masked: bool) -> list[int]:
    """A token for each row of `logits` [rows, vocab] float32; -1 where one is no finite number (`masked`:
    -inf may be among them)."""
    rows, vocab = logits.shape
    chosen = array("i", bytes(4 * rows))
    load(isa).tandem_choose(logits.data_ptr(), rows, logits.stride(0), vocab, draws, masked, _address(chosen))
    return chosen.tolist()


_DRAW = struct.Struct("=QQQdddq")  # seed, position, stream, temperature, top_p, min_p, top_k
_DRAFTED = struct.Struct("=qQ")  # token, address of what it was drawn from


class _Engines(threading.local):
    """Those of one thread, by instruction set and number of threads."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, int], Engine] = {}


_engines = _Engines()


def engine(isa: str) -> Engine:
    """This thread's engine, with as many threads as torch uses. Models take turns on its buffers."""
    wanted = (isa, torch.get_num_threads())  # which may change from step to step, and back
    found = _engines.kept.get(wanted)
    if found is None:
        found = _engines.kept[wanted] = Engine(load(isa), wanted[1])
    return found


@cache
def load(isa: str) -> ctypes.CDLL:
    """The library. Raises `NotNativeError` if it cannot be built, `ConfigError` if it fails its check."""
    found = ctypes.CDLL(str(build.library(isa)))
    handle = ctypes.c_void_p
    found.tandem_engine_new.restype = handle
    found.tandem_engine_new.argtypes = (ctypes.c_int32,)
    found.tandem_engine_delete.argtypes = (handle,)
    found.tandem_engine_delete.restype = None
    found.tandem_forward.argtypes = (handle,) * 9
    found.tandem_forward.restype = None
    found.tandem_guess.argtypes = (*(handle,) * 5, ctypes.c_int32, *(handle,) * 6)
    found.tandem_guess.restype = None
    integer = ctypes.c_int32
    found.tandem_choose.argtypes = (handle, integer, ctypes.c_int64, integer, handle, integer, handle)
    found.tandem_choose.restype = None
    found.tandem_linear.argtypes = (handle, handle, handle, ctypes.c_int32, handle)
    found.tandem_linear.restype = None
    found.tandem_export_blocks.argtypes = (handle, handle, ctypes.c_int64, integer, handle)
    found.tandem_import_blocks.argtypes = (handle, handle, ctypes.c_int64, handle)
    found.tandem_import_blocks.restype = None
    if found.tandem_abi() != ABI:
        raise ConfigError(f"the library has interface {found.tandem_abi()}, not {ABI}")
    _check(found, isa)
    return found


def _check(library: ctypes.CDLL, isa: str) -> None:
    """Every tile shape against torch: a kernel that is wrong on this CPU is not used."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(70, 300, generator=generator).bfloat16().float()  # which half precision holds, too
    x = torch.randn(19, 300, generator=generator)
    engine = Engine(library, 1)
    stored = (weight, weight.half(), weight.bfloat16())
    for packed in (*map(pack_linear, stored), pack_bf16(weight)):
        inputs = x.bfloat16() if packed.struct.format == BF16 else x
        expected = (inputs.double() @ weight.double().T).float()
        for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 19):
            got = engine.linear(packed, x[:rows].contiguous())
            if not torch.allclose(got, expected[:rows], rtol=CHECK_TOLERANCE, atol=CHECK_TOLERANCE * 100):
                raise ConfigError(
                    f"the {isa} kernels fail their check at {rows} rows on this CPU; set TANDEM_NATIVE=off"
                )
