"""Attention in numpy: the reference that both adapters are tested against, and enough for a small decoder."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcache_core.errors import InvalidInput
from kvcache_core.plan import StepPlan
from kvcache_core.store import NumpyStore

__all__ = ["attend", "cached_attention"]

_Array = NDArray[Any]


def attend(
    q: _Array,
    k: _Array,
    v: _Array,
    q_positions: _Array,
    k_positions: _Array,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> _Array:
    """Causal attention of one row; query heads share K/V heads in groups.

    Args:
        q: [Hq, T, D].
        k: [Hkv, S, D]; Hq is a multiple of Hkv.
        v: [Hkv, S, Dv].
        q_positions: [T], absolute.
        k_positions: [S], absolute.
        window: a token sees itself and the ``window`` - 1 tokens before it.
        scale: factor on the scores; default 1 / sqrt(D).
        softcap: scores become ``softcap * tanh(scores / softcap)``.

    Returns:
        [Hq, T, Dv].

    Example:
        >>> one = np.ones((1, 2, 4))
        >>> attend(one, one, one, np.arange(2), np.arange(2)).shape
        (1, 2, 4)
    """
    heads, new, size = q.shape
    if heads % k.shape[0]:
        raise InvalidInput(f"query heads must be a multiple of K/V heads, got {heads} and {k.shape[0]}")
    folded = q.reshape(k.shape[0], -1, size)
    scores = folded @ k.swapaxes(1, 2) * q.dtype.type(size**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    visible = k_positions[None, :] <= q_positions[:, None]
    if window is not None:
        visible &= k_positions[None, :] > q_positions[:, None] - window
    scores = scores.reshape(heads, new, -1)
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    result: _Array = weights.reshape(k.shape[0], -1, k.shape[1]) @ v
    return result.reshape(heads, new, -1)


def cached_attention(
    q: _Array,
    k: _Array,
    v: _Array,
    layer: int,
    store: NumpyStore,
    plan: StepPlan,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> _Array:
    """Write a step's K and V into the store and attend over cached and new tokens.

    The layer's window is the layout's. ``store.apply_copies(plan)`` must have run once for the step.

    Args:
        q: [B, Hq, T, D] for the plan's rows, padded on the right.
        k: [B, Hkv, T, D].
        v: [B, Hkv, T, Dv].
        layer: the layer's number in the layout.
        store: where K and V lie.
        plan: the step.
        scale: factor on the scores; default 1 / sqrt(D).
        softcap: scores become ``softcap * tanh(scores / softcap)``.

    Returns:
        [B, Hq, T, Dv]; padding rows are zero.
    """
    group = plan.groups[store.layout.group_of(layer)]
    result = np.zeros((*q.shape[:3], v.shape[3]), v.dtype)
    for row, count in enumerate(plan.counts):
        slots = group.slots[row, :count]
        store.write(layer, "k", slots, k[row, :, :count].swapaxes(0, 1))
        store.write(layer, "v", slots, v[row, :, :count].swapaxes(0, 1))
    for row, count in enumerate(plan.counts):
        slots = np.concatenate([np.arange(start, start + size) for start, size, _ in group.extents[row]])
        positions = np.concatenate([np.arange(first, first + size) for _, size, first in group.extents[row]])
        result[row, :, :count] = attend(
            q[row, :, :count],
            store.read(layer, "k", slots).swapaxes(0, 1),
            store.read(layer, "v", slots).swapaxes(0, 1),
            plan.positions[row, :count],
            positions,
            window=group.window,
            scale=scale,
            softcap=softcap,
        )
    return result
