"""Frames: a model's input where it is no token ids but vectors of numbers, like the spectrum of a piece of sound.

A frame's token id is 31 bits of a digest of its content. That alone could mistake one frame for another, so the whole
digest, 128 bits, is the extra key at its position: equal content is found again, in this process or another one, and
nothing else is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcache_core.errors import InvalidInput, InvalidType

__all__ = ["Frames", "frames_of", "padded"]

_DIGEST = 16


@dataclass(frozen=True, slots=True)
class Frames:
    """Frames with their keys.

    Attributes:
        values: float32 or float64 [T, F].
        ids: int64 [T], token ids.
        keys: {0 .. T - 1: 16 bytes}.
    """

    values: NDArray[Any]
    ids: NDArray[np.int64]
    keys: Mapping[int, bytes]

    def __len__(self) -> int:
        return len(self.ids)


def frames_of(given: Any, size: int, dtype: str = "float32") -> Frames:
    """Check frames and key them by their content.

    Args:
        given: [T, F], numbers; equal bits after the conversion to ``dtype`` are equal content, NaN included.
        size: F.
        dtype: what the model computes in, float64 or (for everything narrower too) float32.

    Raises:
        InvalidType: no floating-point numbers.
        InvalidInput: another shape, or no frames.

    Example:
        >>> found = frames_of(np.array([[0.0, 1.0], [2.0, 3.0], [0.0, 1.0]]), 2)
        >>> len(found), found.keys[0] == found.keys[2], found.keys[0] == found.keys[1]
        (3, True, False)
    """
    values = np.asarray(given)
    if values.dtype.kind != "f":
        raise InvalidType(f"this model takes frames [T, {size}] of floating-point numbers, got {values.dtype}")
    if values.ndim != 2 or values.shape[1] != size or not len(values):
        raise InvalidInput(f"this model takes frames [T, {size}], at least one; got {values.shape}")
    values = np.ascontiguousarray(values, "float64" if dtype == "float64" else "float32")
    keys = {at: blake2b(frame.tobytes(), digest_size=_DIGEST).digest() for at, frame in enumerate(values)}
    ids = np.array([int.from_bytes(key[:4], "little") >> 1 for key in keys.values()], np.int64)
    return Frames(values, ids, keys)


def padded(rows: Sequence[Frames]) -> NDArray[Any]:
    """[B, T, F], padded on the right with zeros."""
    width, first = max(map(len, rows)), rows[0].values
    result = np.zeros((len(rows), width, first.shape[1]), first.dtype)
    for at, row in enumerate(rows):
        result[at, : len(row)] = row.values
    return result
