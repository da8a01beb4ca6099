"""Noticing that weights changed by looking at a sample of their content."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcache_core.errors import InvalidInput

__all__ = ["VERIFY", "ContentSample", "check_verify", "digest_of"]

VERIFY = ("sample", "full", "never")
"""What a cache looks at to notice changed weights."""

_ALWAYS = 8
"""Elements of each array that every look compares; arrays up to four times as large are compared whole."""
_WHOLE_BELOW = 1 << 16
"""Up to so many elements in all arrays together, every look compares every element."""
_PHASES = 64
"""So many looks compare at least one element of every row."""


def check_verify(verify: str) -> str:
    """Raise InvalidInput unless ``verify`` is one of :data:`VERIFY`."""
    if verify not in VERIFY:
        raise InvalidInput(f"verify must be one of {VERIFY}, got {verify!r}")
    return verify


def digest_of(arrays: Sequence[NDArray[Any]]) -> bytes:
    """16 bytes that stand for every byte of the arrays."""
    digest = blake2b(digest_size=16)
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape};".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.digest()


class ContentSample:
    """A strided sample of arrays that others may write to; it reads them in place.

    A look compares some elements of each array with what they were: a change of a whole array is noticed at once.
    Of arrays with many rows each look compares other rows, so that a change of a single row is noticed within
    64 looks; where all arrays together are small, every look compares every element.

    Args:
        arrays: flat views of the weights' memory.
        row_sizes: elements in a row of each; the stride is one less, so that each row and, over the rows, each
            column is met.
    """

    def __init__(self, arrays: Sequence[NDArray[Any]], row_sizes: Sequence[int]) -> None:
        small = sum(array.size for array in arrays) <= _WHOLE_BELOW
        always: list[NDArray[Any]] = []
        rotating: list[NDArray[Any]] = []
        for array, row in zip(arrays, row_sizes, strict=True):
            bits = array.view(f"u{array.dtype.itemsize}") if array.dtype.itemsize <= 8 else array.view("u8")
            if small or bits.size <= 4 * _ALWAYS:
                always.append(bits)
                continue
            always += (bits[:: -(-bits.size // _ALWAYS)], bits[-1:])
            rotating.append(bits[:: max(1, row - 1)])
        self._phases = [_Part(always)]
        self._phases += [_Part([bits[phase::_PHASES] for bits in rotating]) for phase in range(_PHASES)]
        if not rotating:
            del self._phases[1:]
        self._next = 0

    def changed(self) -> bool:
        """Whether a look finds other elements than before; what it finds then is what later looks compare with."""
        parts = self._phases[:1]
        if len(self._phases) > 1:
            self._next = self._next % _PHASES + 1
            parts = [*parts, self._phases[self._next]]
        if not any(part.changed() for part in parts):
            return False
        for part in self._phases:
            part.changed()
        return True

    def digest(self) -> bytes:
        """16 bytes that stand for the elements that later looks compare with."""
        return digest_of([seen for part in self._phases for seen in part.seen])


class _Part:
    """Elements that are compared together, one array per element size."""

    def __init__(self, views: Sequence[NDArray[Any]]) -> None:
        sizes = sorted({view.dtype.itemsize for view in views})
        self._views = [[view for view in views if view.dtype.itemsize == size] for size in sizes]
        self.seen = [np.concatenate(group) for group in self._views]
        self._now = [seen.copy() for seen in self.seen]

    def changed(self) -> bool:
        """Whether an element differs from the last look; the next look compares with this one."""
        different = False
        for at, group in enumerate(self._views):
            np.concatenate(group, out=self._now[at])
            if not np.array_equal(self._now[at], self.seen[at]):
                different = True
                self._now[at], self.seen[at] = self.seen[at], self._now[at]
        return different
