"""Attention on tensors: plain, and over blocks of a pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

__all__ = [
    "Part",
    "Scoring",
    "attend",
    "attend_in_chunks",
    "attend_parts",
    "causal_mask",
    "dimensions",
    "plain_attention",
    "reshape",
]

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


@dataclass(frozen=True)
class Scoring:
    """Which keys a layer's queries score, and how.

    Attributes:
        window: a token sees itself and the ``window`` - 1 tokens before it; None for all.
        scale: factor on the scores; None for 1 / sqrt(D).
        softcap: scores become ``softcap * tanh(scores / softcap)``; None for no cap.
    """

    window: int | None = None
    scale: float | None = None
    softcap: float | None = None

    def scaled(self, q: _Tensor) -> _Tensor:
        """Queries [..., D] times the factor."""
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        return q * tf.constant(scale, q.dtype)  # tf.cast would round to float32 first

    def capped(self, scores: _Tensor) -> _Tensor:
        """Scores, in float32 at least, after the cap."""
        if scores.dtype in (tf.float16, tf.bfloat16):
            scores = tf.cast(scores, tf.float32)
        return scores if self.softcap is None else self.softcap * tf.tanh(scores / self.softcap)


def attend(q: _Tensor, k: _Tensor, v: _Tensor, mask: _Tensor | None, scoring: Scoring) -> _Tensor:
    """Attention with query heads folded into groups, so that K and V are never repeated.

    Args:
        q: [B, T, Hq, D].
        k: [B, Hkv, S, D].
        v: [B, Hkv, S, Dv].
        mask: bool [B or 1, T, S] of what is visible, the window included, or None where everything is.
        scoring: scale and softcap.

    Returns:
        [B, T, Hq, Dv].
    """
    batch, new, heads, size = dimensions(q)
    _, kv_heads, context, value_size = dimensions(v)
    group = heads // kv_heads
    rows, q_is_single = group * new, q.shape[1] == 1
    q = scoring.scaled(q)
    if not q_is_single:
        q = tf.transpose(reshape(q, (batch, new, kv_heads, group, size)), (0, 2, 3, 1, 4))
    q = reshape(q, (batch, kv_heads, rows, size))
    scores = scoring.capped(tf.matmul(q, k, transpose_b=True))
    if mask is not None:
        # A choice, not a sum: what is not visible may hold anything, NaN included.
        hidden = tf.constant(scores.dtype.min, scores.dtype)
        if q_is_single:
            scores = tf.where(mask[:, None], scores, hidden)
        else:
            scores = reshape(scores, (batch, kv_heads, group, new, context))
            scores = reshape(tf.where(mask[:, None, None], scores, hidden), (batch, kv_heads, rows, context))
    y = tf.matmul(tf.cast(tf.nn.softmax(scores), v.dtype), v)
    if not q_is_single:
        y = tf.transpose(reshape(y, (batch, kv_heads, group, new, value_size)), (0, 3, 1, 2, 4))
    return reshape(y, (batch, new, heads, value_size))


def attend_parts(
    q: _Tensor, parts: Sequence[Part], sizes: _Tensor, bias: _Tensor, scoring: Scoring
) -> tuple[_Tensor, _Tensor, _Tensor]:
    """Attention of one token per row over a context that lies in several parts, not divided yet.

    Args:
        q: [B, H, M, D], scaled.
        parts: keys and values, finite everywhere.
        sizes: int32 [parts], the keys in each.
        bias: [B, 1, 1, S], added to the scores of all parts' S keys.
        scoring: softcap.

    Returns:
        The values' sum [B, H, M, Dv] with weights exp(score - highest score), the sum of these weights [B, H, M, 1],
        and the highest score [B, H, M, 1].
    """
    scores = tf.concat([part.scores(q) for part in parts], axis=-1)
    scores = scoring.capped(scores) + bias
    # TensorFlow's own softmax takes longer to set up than to compute, and would be put in if the division came first.
    top = tf.reduce_max(scores, axis=-1, keepdims=True)
    weights = tf.exp(scores - top)
    total = tf.reduce_sum(weights, axis=-1, keepdims=True)
    shares = tf.split(tf.cast(weights, q.dtype), sizes, axis=-1, num=len(parts))
    values = tf.add_n([part.weighted(share) for share, part in zip(shares, parts, strict=True)])
    return values, total, top


@dataclass(frozen=True)
class Part:
    """Some of a layer's context.

    Attributes:
        keys: [B, H, S, D]; if long [B, H, D, S]: turned, because that is what TensorFlow does fastest there.
        values: [B, H, S, Dv].
        is_long: whether it may be long: TensorFlow then uses oneDNN, which takes longer to set up.
    """

    keys: _Tensor
    values: _Tensor
    is_long: bool

    def scores(self, q: _Tensor) -> _Tensor:
        """Queries [B, H, M, D] times all keys, [B, H, M, S]."""
        return tf.matmul(q, self.keys) if self.is_long else _few(q, self.keys, turn=True)

    def weighted(self, weights: _Tensor) -> _Tensor:
        """The values' sum [B, H, M, Dv] with weights [B, H, M, S]."""
        return tf.matmul(weights, self.values) if self.is_long else _few(weights, self.values)


def _few(a: _Tensor, b: _Tensor, *, turn: bool = False) -> _Tensor:
    """Batched a times b, or b turned, where b is small.

    Row by row on a processor: TensorFlow then multiplies without packing b anew, and never hands it to oneDNN.
    """
    if a.dtype != tf.float32 or tf.config.list_physical_devices("GPU"):
        return tf.matmul(a, b, transpose_b=turn)
    return tf.squeeze(tf.raw_ops.BatchMatMulV3(x=a[:, :, :, None], y=b[:, :, None], Tout=a.dtype, adj_y=turn), axis=3)


def attend_in_chunks(
    q: _Tensor,
    k: _Tensor,
    v: _Tensor,
    q_positions: _Tensor,
    first: _Tensor,
    scoring: Scoring,
) -> _Tensor:
    """:func:`attend` for many new tokens, some at a time, over no more keys than those can see.

    Args:
        q_positions: int32 [B, T], ascending in each row.
        first: int32 [B], position of each row's first key; keys follow without gaps.
    """
    _, new, heads, _ = dimensions(q)
    context, value_size, window = tf.shape(k)[2], v.shape[-1], scoring.window
    low, high = q_positions - first[:, None], q_positions - first[:, None] + 1

    def chunk(number: _Tensor, done: _Tensor) -> tuple[_Tensor, _Tensor]:
        begin = number * _CHUNK
        end = tf.minimum(begin + _CHUNK, new)
        stop = tf.minimum(tf.reduce_max(high[:, end - 1]), context)
        start = tf.constant(0) if window is None else tf.maximum(0, tf.reduce_min(low[:, begin]) - window + 1)
        keys = first[:, None] + tf.range(start, stop)
        mask = causal_mask(q_positions[:, begin:end], keys, window)
        y = attend(q[:, begin:end], k[:, :, start:stop], v[:, :, start:stop], mask, scoring)
        return number + 1, done.write(number, tf.transpose(y, (1, 0, 2, 3)))  # [T, B, Hq, Dv]

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


def plain_attention(q: _Tensor, k: _Tensor, v: _Tensor, scoring: Scoring, *, in_chunks: bool = False) -> _Tensor:
    """Causal attention of [B, T, H, D] among themselves, differentiable."""
    k, v = tf.transpose(k, (0, 2, 1, 3)), tf.transpose(v, (0, 2, 1, 3))
    if q.shape[1] == 1:
        return attend(q, k, v, None, scoring)
    where = tf.range(tf.shape(q)[1])[None]
    if in_chunks:
        return attend_in_chunks(q, k, v, where, tf.zeros((1,), tf.int32), scoring)
    return attend(q, k, v, causal_mask(where, where, scoring.window), scoring)
