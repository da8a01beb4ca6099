"""Memory for evicted blocks on their way down, used again: the pages of fresh memory cost more than the copy."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Staging"]


class Staging:
    """Arrays that are handed out, and handed out again when nobody holds them or a view of them any more.

    Args:
        keep: bytes that are kept for later, at most.

    Example:
        >>> staging = Staging(1 << 20)
        >>> staging.take(3, 1000).shape
        (3, 1000)
        >>> staging.nbytes  # rounded up to a power of two, and free again
        4096
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._idle: dict[int, list[NDArray[np.uint8]]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that lie ready."""
        return sum(size * len(arrays) for size, arrays in list(self._idle.items()))

    def take(self, count: int, nbytes: int) -> NDArray[np.uint8]:
        """An array uint8 [``count``, ``nbytes``], its content anything. It is taken back when it and all its views
        are gone.
        """
        size = 1 << (count * nbytes - 1).bit_length()
        try:
            memory = self._idle[size].pop()
        except LookupError:
            memory = np.empty(size, np.uint8)
        # Views keep the array that they were made from, as its memory is no array's: so its end is the end of them all.
        handed = np.frombuffer(memory.data, np.uint8)
        weakref.finalize(handed, partial(self._take_back, memory)).atexit = False
        return handed[: count * nbytes].reshape(count, nbytes)

    def _take_back(self, memory: NDArray[Any]) -> None:
        """Called from whichever thread was the last to hold a view, in the middle of anything: takes no lock."""
        if self.nbytes + memory.nbytes <= self._keep:
            self._idle.setdefault(memory.nbytes, []).append(memory)
