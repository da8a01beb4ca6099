"""Two kernels in C for decode steps, compiled on this machine for this machine when a cache is asked to compile."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from array import array
from collections.abc import Sequence
from functools import cache
from itertools import accumulate, chain
from pathlib import Path

import torch
from torch import Tensor

from kvcache_core.extents import shared_extents

__all__ = ["DecodeReads", "Kernels", "active", "load", "use_native"]

_SOURCES = [Path(__file__).with_name(name) for name in ("decode.c", "linear.c")]
_WIDEST = 256
"""Largest head size, as in the source."""
_PIECE = 256
"""Tokens of a piece of K/V that one thread reads: small enough that all threads have as much to do."""


class Kernels:
    """The compiled library.

    Args:
        path: where it lies.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self.decode = library.kvcache_decode
        self.decode.restype = None
        self.decode.argtypes = [*[ctypes.c_void_p] * 14, ctypes.c_float]
        self._linear = library.kvcache_linear
        self._linear.restype = None
        self._linear.argtypes = [*[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 3]

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Weight [out, in] times x [..., in], plus bias: [..., out]; all float32 on the CPU, weight contiguous."""
        x = x.contiguous()
        out, size = weight.shape
        y = x.new_empty(*x.shape[:-1], out)
        at = None if bias is None else bias.contiguous().data_ptr()
        self._linear(x.data_ptr(), weight.data_ptr(), at, y.data_ptr(), x.numel() // size, size, out)
        return y


class DecodeReads:
    """What the rows of a decode step read and write, for the kernel: made once, the same for all layers of a group.

    A piece of K/V that several rows share is read once for all of them.

    Args:
        kernels: the library.
        per_row: per row, (first slot, tokens, first position) of each of its extents, its new token included.
        slots: where each row's new K and V go.
    """

    def __init__(self, kernels: Kernels, per_row: Sequence[Sequence[tuple[int, int, int]]], slots: Sequence[int]):
        self._decode = kernels.decode
        self._rows = len(per_row)
        pieces: list[tuple[int, int, int, int]] = []
        readers: list[int] = []
        mine: list[list[int]] = [[] for _ in per_row]
        for shared in shared_extents(per_row):
            for at in range(0, shared.size, _PIECE):
                pieces.append((shared.slot + at, min(_PIECE, shared.size - at), len(readers), len(shared.rows)))
                for row in shared.rows:
                    mine[row].append(len(readers))
                    readers.append(row)
        starts = [0, *accumulate(map(len, mine))]
        self._pieces = len(pieces)
        self._readers = len(readers)
        lists = (list(chain.from_iterable(pieces)), readers, slots, starts, list(chain.from_iterable(mine)))
        self._numbers = [array("q", numbers) for numbers in lists]
        self._lists = [numbers.buffer_info()[0] for numbers in self._numbers]
        self._scratch: Tensor | None = None

    @staticmethod
    def serve(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> bool:
        """Whether these are what the kernel is for: float32 on the CPU, K and V of one head size."""
        width = q.shape[3]
        return (
            keys.dtype == values.dtype == q.dtype == torch.float32
            and q.device.type == "cpu"
            and width == v.shape[3] <= _WIDEST
            and q.stride(3) == k.stride(3) == v.stride(3) == 1
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
        """Write the new K and V [B, H, 1, D] into the pool's [H, slots, D], and attend q [B, Hq, 1, D] -> the same."""
        rows, queries, _, width = q.shape
        heads = keys.shape[0]
        needed = self._readers * queries * (width + 2)
        if self._scratch is None or self._scratch.numel() < needed:
            self._scratch = q.new_empty(needed)
        out = q.new_empty(rows, queries, 1, width)
        shape = (ctypes.c_int64 * 5)(rows, heads, queries // heads, width, self._pieces)
        strides = (ctypes.c_int64 * 8)(
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], keys.stride(0), values.stride(0)
        )
        self._decode(
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            out.data_ptr(),
            self._scratch.data_ptr(),
            shape,
            strides,
            *self._lists,
            width**-0.5 if scale is None else scale,
        )
        return out


_active: list[Kernels] = []
"""The kernels, once :func:`use_native` has found them."""


def active() -> Kernels | None:
    """The kernels, if they are in use."""
    return _active[0] if _active else None


def use_native() -> bool:
    """Use the kernels from now on, in this process; False if there are none."""
    kernels = load()
    if kernels is not None:
        _active[:] = [kernels]
    return kernels is not None


@cache
def load() -> Kernels | None:
    """The kernels, or None where they cannot be compiled: then PyTorch's own are used."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not torch.backends.openmp.is_available():
        return None
    # Compiled for OpenMP but not linked against it: it must use the threads of the runtime that PyTorch has loaded.
    # Linked without -ffast-math, which would change how the whole process treats denormal numbers.
    flags = ["-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC"]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "kernels.so"
        objects = [Path(folder) / f"{source.stem}.o" for source in _SOURCES]
        try:
            for source, built in zip(_SOURCES, objects, strict=True):
                _run([compiler, *flags, "-c", str(source), "-o", str(built)])
            _run([compiler, "-shared", *map(str, objects), "-o", str(library), "-lm"])
            return Kernels(library)
        except (OSError, subprocess.SubprocessError, AttributeError):
            return None


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=120)
