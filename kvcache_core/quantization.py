"""Stored dtypes in numpy: what a value becomes in the store and what is read back. The reference for both adapters.

int8 and float8 (e4m3: OCP 8-bit floating point specification, largest number 448) have one float32 scale per token and
head: the largest element of the D becomes the largest stored number. KIVI (Liu et al., 2024) scales V per token as
here, but K per channel, which needs many tokens before any is stored.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["decode", "encode", "is_exact"]

LARGEST = {"int8": 127.0, "float8_e4m3": 448.0}
"""The largest number of each dtype that is stored with a scale."""

_TINY = np.finfo(np.float32).tiny
_HOLDS = {
    "float64": {"float64", "float32", "float16", "bfloat16"},
    "float32": {"float32", "float16", "bfloat16"},
    "float16": {"float16"},
    "bfloat16": {"bfloat16"},
}
"""The dtypes of which each holds every value."""


def is_exact(stored: str, computed: str) -> bool:
    """Whether every value of the dtype ``computed`` comes back from a store of dtype ``stored`` as it was.

    Example:
        >>> is_exact("float32", "bfloat16"), is_exact("bfloat16", "float32"), is_exact("int8", "float16")
        (True, False, False)
    """
    return computed in _HOLDS.get(stored, ())


def encode(values: NDArray[Any], dtype: str) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
    """What a store keeps of ``values`` [..., D].

    Returns:
        The elements, or their bits where numpy has no such type (bfloat16 as uint16, float8 as uint8); and scales
        [..., 1] for int8 and float8, else None. What is not finite comes back as NaN.

    Example:
        >>> encode(np.array([[1.0, -2.0, 0.26]]), "int8")
        (array([[  64, -127,   17]], dtype=int8), array([[0.01574803]], dtype=float32))
    """
    if dtype in LARGEST:
        values = values.astype(np.float32)
        scales = np.abs(values).max(axis=-1, keepdims=True, initial=0) / np.float32(LARGEST[dtype])
        scales[scales < _TINY] = 0  # denormal numbers: adapters may compute with them or not
        with np.errstate(invalid="ignore"):
            scaled = values / np.maximum(scales, _TINY)
            bits = np.rint(scaled).astype(np.int8) if dtype == "int8" else _to_float8(scaled)
        return bits, scales
    if dtype == "bfloat16":
        return _to_bfloat16(values.astype(np.float32)), None
    return values.astype(dtype), None


def decode(bits: NDArray[Any], scales: NDArray[np.float32] | None, dtype: str) -> NDArray[Any]:
    """The reverse of :func:`encode`; float32 where numpy has no such type.

    Example:
        >>> decode(*encode(np.array([[1.0, -2.0, 0.26]]), "int8"), "int8").astype(float).round(3).tolist()
        [[1.008, -2.0, 0.268]]
    """
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if scales is None:
        return bits
    with np.errstate(invalid="ignore"):
        found: NDArray[Any] = (bits.astype(np.float32) if dtype == "int8" else _float8_values()[bits]) * scales
    return found


def _to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """To the nearest, halves to even."""
    bits = values.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _to_float8(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """To the nearest, halves to even; beyond the largest number, to that."""
    known = _float8_values()[:127]
    between = (known[1:] + known[:-1]) / 2
    size = np.abs(values)
    at = np.searchsorted(between, size)
    at += (at < len(between)) & (size == between[np.minimum(at, len(between) - 1)]) & (at % 2 == 1)
    at = np.where(np.isnan(values), 127, at)
    return (at | np.where(np.signbit(values), 128, 0)).astype(np.uint8)


@cache
def _float8_values() -> NDArray[np.float32]:
    """The 256 numbers of float8 e4m3: sign, 4 bits of exponent (bias 7), 3 bits of mantissa, no infinity."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    positive = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    positive[127] = np.nan
    return np.concatenate([positive, -positive]).astype(np.float32)
