"""Noticing that weights changed by looking at a sample of their content."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcache_core.errors import InvalidInput

__all__ = ["VERIFY", "ContentSample", "check_verify", "digest_of"]

VERIFY = ("sample", "full", "never")
"""What a cache looks at to notice changed weights."""

_ALWAYS = 8
"""Every look compares at least so many elements of each array; arrays up to four times as large it compares whole."""
_WHOLE_BELOW = 1 << 16
"""Up to so many elements in all arrays together, every look compares every element."""


def check_verify(verify: str) -> str:
    """Raise InvalidInput unless ``verify`` is one of :data:`VERIFY`."""
    if verify not in VERIFY:
        raise InvalidInput(f"verify must be one of {VERIFY}, got {verify!r}")
    return verify


def digest_of(arrays: Sequence[NDArray[Any]]) -> bytes:
    """16 bytes that stand for every byte of the arrays."""
    digest = sha256()  # which processors have instructions for: twice as fast as BLAKE2
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape};".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.digest()[:16]


class ContentSample:
    """A strided sample of arrays that others may write to; it reads them in place.

    A look compares some elements of each array with what they were: a change of a whole array is noticed at once.
    Each look compares other rows, so that a change of a single row is noticed within ``looks`` of them, and of arrays
    with few rows always the same elements besides; where all arrays together are small, every look compares every
    element.

    Args:
        arrays: flat views of the weights' memory.
        row_sizes: elements in a row of each; the stride is one less, so that each row and, over the rows, each
            column is met.
        looks: so many of them meet every row; a look takes the longer the fewer they are.
    """

    def __init__(self, arrays: Sequence[NDArray[Any]], row_sizes: Sequence[int], looks: int) -> None:
        small = sum(array.size for array in arrays) <= _WHOLE_BELOW
        always: list[NDArray[Any]] = []
        rotating: list[NDArray[Any]] = []
        for array, row in zip(arrays, row_sizes, strict=True):
            bits = array.view(f"u{min(8, array.itemsize)}")
            if small or bits.size <= 4 * _ALWAYS:
                always.append(bits)
                continue
            rotating.append(bits[:: max(1, row - 1)])
            if rotating[-1].size < looks * _ALWAYS:  # a look's share of them is too small
                always += (bits[:: -(-bits.size // _ALWAYS)], bits[-1:])
        self._arrays = list(arrays)  # the memory that is read
        self._always, self._rotating = _places_of(always, 1), _places_of(rotating, looks)
        self._looks, self._next = looks, 0

    def changed(self) -> bool:
        """Whether a look finds other elements than before; what it finds then is what later looks compare with."""
        self._next = (self._next + 1) % self._looks
        if not (
            any(places.changed() for places in self._always)
            or any(places.changed(self._next) for places in self._rotating)
        ):
            return False
        for places in (*self._always, *self._rotating):
            places.look()
        return True

    def digest(self) -> bytes:
        """16 bytes that stand for the elements that later looks compare with."""
        return digest_of([places.seen for places in (*self._always, *self._rotating)])


class _Places:
    """Elements of one size, wherever in memory they lie, and what they were at the last look.

    One gather reads them all: an array for each weight would take longer to find than its elements to read.

    Args:
        size: bytes of an element.
        offset: what their addresses leave when divided by the size.
        numbers: int64, address // size of each.
        phases: every so-manyth of them is compared at a look. Those of one phase are kept side by side: what a look
            does not need does not come through the processor's caches.
    """

    def __init__(self, size: int, offset: int, numbers: NDArray[np.int64], phases: int) -> None:
        self._memory = np.asarray(_Memory(size, offset))
        parts = [numbers[phase::phases] - 1 for phase in range(phases)]
        ends = np.cumsum([0, *map(len, parts)]).tolist()
        self._parts = [slice(*ends[phase : phase + 2]) for phase in range(phases)]
        self._numbers = np.concatenate(parts)
        self.look()

    def look(self) -> None:
        """What is there now is what later looks compare with."""
        self.seen = self._memory[self._numbers]

    def changed(self, phase: int = 0) -> bool:
        """Whether an element of this phase differs from what was seen."""
        part = self._parts[phase]
        return not np.array_equal(self._memory[self._numbers[part]], self.seen[part])


class _Memory:
    """All of memory as one array, from its first element but one. Only what is known to be there may be read."""

    def __init__(self, size: int, offset: int) -> None:
        self.__array_interface__ = {
            "version": 3,
            "typestr": np.dtype(f"u{size}").str,
            "data": (size + offset, True),  # not 0: an array's address may not be null
            "shape": (2**62 // size,),
        }


def _places_of(views: Sequence[NDArray[Any]], phases: int) -> list[_Places]:
    """The elements of all views, [N] each, those of equal size and alignment together."""
    found: dict[tuple[int, int], list[NDArray[np.int64]]] = {}
    for view in views:
        size, address = view.itemsize, view.__array_interface__["data"][0]
        numbers = address // size + np.arange(view.size) * (view.strides[0] // size)
        found.setdefault((size, address % size), []).append(numbers)
    return [_Places(*kind, np.concatenate(numbers), phases) for kind, numbers in sorted(found.items())]
