"""Kernels in C for attention and decode steps, compiled for this machine when a cache is asked to compile."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from functools import cache
from itertools import accumulate, chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvcache_core.extents import shared_extents
from kvcache_torch.build import built

__all__ = ["DecodeReads", "Kernels", "PrefillReads", "active", "load", "use_native"]

_WIDEST = 256
"""Largest head size, as in the source."""
_FEWEST = 8
"""Queries of a row and a K/V head from which on the kernel for several tokens is faster than PyTorch's attention over
any context, as `python tests/bench/torch_prefill.py` has measured it."""
_FOREVER = 1 << 40
"""A window that hides nothing."""
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
        self.prefill = library.kvcache_prefill
        self.prefill.restype = None
        self.prefill.argtypes = [*[ctypes.c_void_p] * 10, ctypes.c_int64, ctypes.c_float]
        self._linear = library.kvcache_linear
        self._linear.restype = None
        self._linear.argtypes = [*[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 3]
        self._library = library

    def define_operator(self) -> bool:
        """Define ``kvcache::linear_few``, once per process; False where it could not be compiled."""
        define = getattr(self._library, "kvcache_define_operator", None)
        return define is not None and bool(define())

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


class PrefillReads:
    """What the rows of a step of several tokens read and write, for the kernel: made once for all layers of a group.

    Args:
        kernels: the library.
        per_row: per row, (first slot, tokens, first position) of each of its extents, its new tokens included.
        slots: int64 [B, T], where each row's new K and V go.
        starts: int64 [B], tokens each row has before the step.
        counts: int64 [B], new tokens of each row.
        window: tokens that a token sees, itself included; None for all.
    """

    def __init__(
        self,
        kernels: Kernels,
        per_row: Sequence[Sequence[tuple[int, int, int]]],
        slots: NDArray[np.int64],
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
        window: int | None = None,
    ) -> None:
        self._prefill = kernels.prefill
        sizes = [len(extents) for extents in per_row]
        firsts = [0, *accumulate(sizes)][:-1]
        self._rows = np.stack([starts, counts, firsts, sizes], axis=1).astype(np.int64)
        self._extents = np.array(list(chain.from_iterable(per_row)), np.int64)
        self._slots = np.ascontiguousarray(slots, np.int64)
        self._lists = [numbers.ctypes.data for numbers in (self._rows, self._extents, self._slots)]
        self._window = _FOREVER if window is None else window

    @staticmethod
    def serve(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> bool:
        """Whether these are what the kernel is for: float32 on the CPU, V's head size a multiple of 8, not too few
        queries.
        """
        return (
            keys.dtype == values.dtype == q.dtype == torch.float32
            and q.device.type == "cpu"
            and max(q.shape[3], v.shape[3]) <= _WIDEST
            and not v.shape[3] % 8
            and q.shape[2] * q.shape[1] >= _FEWEST * k.shape[1]
            and q.stride(3) == k.stride(3) == v.stride(3) == 1
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
        """Write the new K and V [B, H, T, D] into the pool's [H, slots, D], and attend q [B, Hq, T, D].

        Returns:
            [B, Hq, T, Dv], a view of [B, T, Hq, Dv]: what a model's next product takes.
        """
        rows, queries, tokens, width = q.shape
        heads = keys.shape[0]
        out = q.new_empty(rows, tokens, queries, v.shape[3])
        sizes = (rows, heads, queries // heads, tokens, width, v.shape[3], torch.get_num_threads())
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], keys.stride(0), values.stride(0))
        self._prefill(
            *(tensor.data_ptr() for tensor in (q, k, v, keys, values, out)),
            (ctypes.c_int64 * 18)(*sizes, *strides),
            *self._lists,
            self._window,
            width**-0.5 if scale is None else scale,
        )
        return out.transpose(1, 2)


_active: list[Kernels] = []
"""The kernels, once :func:`use_native` has found them."""
_operators: list[str] = []
"""The operators that they have defined."""


def active() -> Kernels | None:
    """The kernels, if they are in use."""
    return _active[0] if _active else None


def has_operator() -> bool:
    """Whether there is ``kvcache::linear_few``."""
    return bool(_operators)


def use_native() -> bool:
    """Use the kernels from now on, in this process; False if there are none."""
    kernels = load()
    if kernels is not None and not _active:
        _active.append(kernels)
        if kernels.define_operator():
            torch.library.register_fake("kvcache::linear_few", _linear_few)
            _operators.append("linear_few")
    return kernels is not None


def _linear_few(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What the compiler sees of it."""
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@cache
def load() -> Kernels | None:
    """The kernels, or None where they cannot be compiled: then PyTorch's own are used."""
    return built(Kernels) if torch.backends.openmp.is_available() else None
