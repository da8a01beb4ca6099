"""Attention on tensors: plain, and over blocks of a pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

__all__ = ["attend", "attend_in_chunks", "causal_mask", "dimensions", "plain_attention", "reshape"]

_Tensor = Any
_CHUNK = 256
"""Queries attended at once: their scores stay in the processor's cache, and what lies in the future of all of
them is not computed."""


def dimensions(x: _Tensor) -> list[Any]:
    """The shape, a number where it is known and a scalar tensor where not."""
    known = x.shape.as_list()
    if None not in known:
        return list(known)
    dynamic = tf.shape(x)
    return [dynamic[axis] if size is None else size for axis, size in enumerate(known)]


def reshape(x: _Tensor, shape: Sequence[Any]) -> _Tensor:
    """``tf.reshape`` that leaves one open dimension to TensorFlow: a constant shape costs a graph nothing."""
    opened = [axis for axis, size in enumerate(shape) if not isinstance(size, int)]
    if len(opened) == 1:
        shape = [-1 if axis == opened[0] else size for axis, size in enumerate(shape)]
    return tf.reshape(x, shape)


def attend(
    q: _Tensor,
    k: _Tensor,
    v: _Tensor,
    mask: _Tensor | None,
    scale: float | None,
    softcap: float | None,
) -> _Tensor:
    """Attention with query heads folded into groups, so that K and V are never repeated.

    Args:
        q: [B, T, Hq, D].
        k: [Hkv, B, S, D].
        v: [Hkv, B, S, Dv].
        mask: bool [B or 1, T, S], or None where everything is visible.
        scale: factor on the scores; default 1 / sqrt(D).
        softcap: scores become ``softcap * tanh(scores / softcap)``.

    Returns:
        [B, T, Hq, Dv].
    """
    batch, new, heads, size = dimensions(q)
    kv_heads, _, context, value_size = dimensions(v)
    group = heads // kv_heads
    rows, q_is_single = group * new, q.shape[1] == 1
    q = q * tf.constant(size**-0.5 if scale is None else scale, q.dtype)  # tf.cast would round to float32 first
    q = reshape(q, (batch, new, kv_heads, group, size))
    q = reshape(tf.transpose(q, (2, 0, 3, 1, 4)), (kv_heads, batch, rows, size))
    if q_is_single:
        # The large operand on the left: with the few queries there, TensorFlow reads the keys 1.6 times slower.
        scores = tf.transpose(tf.matmul(k, q, transpose_b=True), (0, 1, 3, 2))
    else:
        scores = tf.matmul(q, k, transpose_b=True)
    if scores.dtype in (tf.float16, tf.bfloat16):
        scores = tf.cast(scores, tf.float32)
    if softcap is not None:
        scores = softcap * tf.tanh(scores / softcap)
    if mask is not None:
        # A choice, not a sum: what is not visible may hold anything, NaN included.
        hidden = tf.constant(scores.dtype.min, scores.dtype)
        if q_is_single:
            scores = tf.where(mask[None], scores, hidden)
        else:
            scores = reshape(scores, (kv_heads, batch, group, new, context))
            scores = reshape(tf.where(mask[None, :, None], scores, hidden), (kv_heads, batch, rows, context))
    weights = tf.cast(tf.nn.softmax(scores), v.dtype)
    y = reshape(tf.matmul(weights, v), (kv_heads, batch, group, new, value_size))
    return reshape(tf.transpose(y, (1, 3, 0, 2, 4)), (batch, new, heads, value_size))


def attend_in_chunks(
    q: _Tensor,
    k: _Tensor,
    v: _Tensor,
    q_positions: _Tensor,
    first: _Tensor,
    window: int | None,
    scale: float | None,
    softcap: float | None,
) -> _Tensor:
    """:func:`attend` for many new tokens, some at a time, over no more keys than those can see.

    Args:
        q_positions: int32 [B, T], ascending in each row.
        first: int32 [B], position of each row's first key; keys follow without gaps.
    """
    _, new, heads, _ = dimensions(q)
    context, value_size = tf.shape(k)[2], v.shape[-1]
    low, high = q_positions - first[:, None], q_positions - first[:, None] + 1

    def chunk(number: _Tensor, done: _Tensor) -> tuple[_Tensor, _Tensor]:
        begin = number * _CHUNK
        end = tf.minimum(begin + _CHUNK, new)
        stop = tf.minimum(tf.reduce_max(high[:, end - 1]), context)
        start = tf.constant(0) if window is None else tf.maximum(0, tf.reduce_min(low[:, begin]) - window + 1)
        keys = first[:, None] + tf.range(start, stop)
        mask = causal_mask(q_positions[:, begin:end], keys, window)
        y = attend(q[:, begin:end], k[:, :, start:stop], v[:, :, start:stop], mask, scale, softcap)
        return number + 1, done.write(number, tf.transpose(y, (1, 0, 2, 3)))

    count = (new + _CHUNK - 1) // _CHUNK
    parts = tf.TensorArray(v.dtype, size=count, infer_shape=False, element_shape=(None, q.shape[0], heads, value_size))
    _, parts = tf.while_loop(lambda number, _: number < count, chunk, (tf.constant(0), parts), parallel_iterations=1)
    return tf.ensure_shape(tf.transpose(parts.concat(), (1, 0, 2, 3)), (*q.shape[:2], heads, value_size))


def causal_mask(q_positions: _Tensor, k_positions: _Tensor, window: int | None) -> _Tensor:
    """Bool [B, T, S] of what is visible from positions [B, T] at positions [B, S]."""
    q_positions, k_positions = q_positions[:, :, None], k_positions[:, None, :]
    mask = k_positions <= q_positions
    if window is not None:
        mask = mask & (k_positions > q_positions - window)
    return mask


def plain_attention(
    q: _Tensor,
    k: _Tensor,
    v: _Tensor,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    *,
    in_chunks: bool = False,
) -> _Tensor:
    """Causal attention of [B, T, H, D] among themselves, differentiable."""
    k, v = tf.transpose(k, (2, 0, 1, 3)), tf.transpose(v, (2, 0, 1, 3))
    if q.shape[1] == 1:
        return attend(q, k, v, None, scale, softcap)
    where = tf.range(tf.shape(q)[1])[None]
    if in_chunks:
        return attend_in_chunks(q, k, v, where, tf.zeros((1,), tf.int32), window, scale, softcap)
    return attend(q, k, v, causal_mask(where, where, window), scale, softcap)
