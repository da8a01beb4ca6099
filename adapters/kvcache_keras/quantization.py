"""Stored dtypes in TensorFlow: what a value becomes in the store, bit for bit as in kvcache_core.quantization."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from kvcache_core.layout import SCALED_DTYPES
from kvcache_core.quantization import LARGEST, decode

__all__ = ["decoded", "encoded", "variable_dtype"]

_Tensor = Any
_TINY = float(np.finfo(np.float32).tiny)
_FLOAT8 = decode(np.arange(256, dtype=np.uint8), np.ones(1, np.float32), "float8_e4m3")
"""The number behind each of the 256 codes."""


def variable_dtype(dtype: str) -> str:
    """The dtype of a pool variable; float8 lies as its bits, because TensorFlow cannot gather it."""
    return "uint8" if dtype == "float8_e4m3" else dtype


def encoded(values: _Tensor, dtype: str) -> tuple[_Tensor, _Tensor | None]:
    """What is kept of ``values`` [..., D]: elements or their bits, and float32 scales [..., 1] or None."""
    if dtype not in SCALED_DTYPES:
        return tf.cast(values, dtype), None
    values = tf.cast(values, tf.float32)
    scales = tf.reduce_max(tf.abs(values), axis=-1, keepdims=True) / LARGEST[dtype]
    scales = tf.where(scales < _TINY, tf.zeros((), tf.float32), scales)
    scaled = values / tf.maximum(scales, _TINY)
    return tf.cast(tf.round(scaled), tf.int8) if dtype == "int8" else _to_float8(scaled), scales


def decoded(bits: _Tensor, scales: _Tensor | None, dtype: Any) -> _Tensor:
    """What was stored, in ``dtype``; the multiplication by scales in float32."""
    if scales is None:
        return tf.cast(bits, dtype)
    is_float8 = bits.dtype == tf.uint8
    values = tf.gather(tf.constant(_FLOAT8), tf.cast(bits, tf.int32)) if is_float8 else tf.cast(bits, tf.float32)
    return tf.cast(values * scales, dtype)


def _to_float8(values: _Tensor) -> _Tensor:
    """To the nearest code, halves to even; beyond the largest number, to that."""
    bits = tf.bitcast(values, tf.int32)
    size = tf.abs(values)
    # The exponent of each number, but at least that of the smallest normal one, 2 ** -6.
    exponent = tf.maximum(tf.bitwise.right_shift(tf.bitcast(size, tf.int32), 23) - 127, -6)
    step = tf.bitcast(tf.bitwise.left_shift(exponent - 3 + 127, 23), tf.float32)
    # 8 .. 16 steps of a normal number, fewer of a subnormal one; 16 is the next exponent's first.
    code = tf.minimum((exponent + 6) * 8 + tf.cast(tf.round(size / step), tf.int32), 126)
    code = tf.where(tf.math.is_nan(values), 127, code)
    return tf.cast(code + tf.where(bits < 0, 128, 0), tf.uint8)
