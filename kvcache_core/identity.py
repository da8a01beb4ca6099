"""A portable identity of a model's weights: 16 bytes that do not depend on who holds them.

Names, order, axis order, splitting and fusing of the parameters do not matter, so a PyTorch and a Keras copy of the
same weights agree: the bits of every element are mixed on their own and summed, and a sum does not mind the order.
The price is that a model whose elements were only permuted has the same identity.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["named_identity", "weights_identity"]

_CHUNK = 1 << 15
# Odd 64-bit constants of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def named_identity(name: str) -> bytes:
    """The identity that a caller has given the weights by name."""
    return hashlib.blake2b(name.encode(), digest_size=16, person=b"kvcache-name").digest()


def weights_identity(parameters: Iterable[tuple[str, NDArray[Any]]]) -> bytes:
    """The identity of weights by content.

    Args:
        parameters: (dtype name, elements or their bits) of every distinct parameter; elements of 1, 2, 4 or 8 bytes,
            any shape.

    Example:
        >>> weights = np.arange(6, dtype=np.float32).reshape(2, 3)
        >>> whole = weights_identity([("float32", weights)])
        >>> parts = weights_identity([("float32", weights.T[1:]), ("float32", weights.T[:1])])
        >>> whole == parts, whole == weights_identity([("float32", weights + 1)])
        (True, False)
    """
    sums: dict[str, tuple[int, int, int]] = {}
    for dtype, values in parameters:
        sums[dtype] = tuple(map(sum, zip(sums.get(dtype, (0, 0, 0)), _sums(values), strict=True)))  # type: ignore[assignment]
    digest = hashlib.blake2b(digest_size=16, person=b"kvcache-weights")
    for dtype in sorted(sums):
        name = dtype.encode()
        digest.update(struct.pack("<Q", len(name)) + name)
        digest.update(struct.pack("<3Q", *(value % 2**64 for value in sums[dtype])))
    return digest.digest()


def _sums(values: NDArray[Any]) -> tuple[int, int, int]:
    """Number of elements, and two sums of their mixed bits. The mix is one to one: one changed element shows."""
    # Whatever order the elements lie in memory is as good as any other.
    flat = np.ravel(values, order="K")
    bits = flat.view(f"<u{flat.dtype.itemsize}")
    first = second = 0
    wide, shifted = np.empty(_CHUNK, np.uint64), np.empty(_CHUNK, np.uint64)
    for start in range(0, len(bits), _CHUNK):
        part = bits[start : start + _CHUNK]
        z, t = wide[: len(part)], shifted[: len(part)]
        z[...] = part
        z += _GAMMA
        _mix(z, t, 30, _MIX_1)
        first += int(np.add.reduce(z))
        _mix(z, t, 27, _MIX_2)
        np.right_shift(z, 31, out=t)
        np.bitwise_xor(z, t, out=z)
        second += int(np.add.reduce(z))
    return len(bits), first, second


def _mix(z: NDArray[np.uint64], t: NDArray[np.uint64], shift: int, factor: np.uint64) -> None:
    np.right_shift(z, shift, out=t)
    np.bitwise_xor(z, t, out=z)
    np.multiply(z, factor, out=z)
