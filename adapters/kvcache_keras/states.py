"""Layers whose past is one state of fixed size: a step's inputs behind their context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from kvcache_core.errors import InvalidInput
from kvcache_core.layout import LayerSpec
from kvcache_core.plan import GroupPlan
from kvcache_keras.store import TensorStore, dtype_name

__all__ = ["STATE_SHAPES", "behind_zeros", "note_context", "pack_states", "with_context"]

_Tensor = Any

STATE_SHAPES: tuple[list[int | None], ...] = ([None], [None, 3])
"""Shapes of what :func:`pack_states` returns."""


def pack_states(group: GroupPlan) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The state group's part of a packed plan: blocks to read [B], and (row, new tokens, block) to write [N, 3]."""
    return group.state_reads, group.state_writes


def with_context(store: TensorStore, layer: int, packed: Sequence[_Tensor], stride: _Tensor, x: _Tensor) -> _Tensor:
    """Inputs [B, T, C] behind the rows' states, [B, R + T, C]; the new states go into the store."""
    reads, writes = packed
    array, rows = store.array(layer, "state"), tf.range(store.spec(layer, "state").heads)
    past = tf.gather(array, rows * stride + reads[:, None])[:, :, 0]
    past = tf.where((reads > 0)[:, None, None], tf.cast(past, x.dtype), tf.zeros([], x.dtype))
    joined = tf.concat((past, x), axis=1)
    index = writes[:, 1:2] + rows
    new = tf.gather_nd(joined, tf.stack((tf.broadcast_to(writes[:, :1], tf.shape(index)), index), axis=-1))
    tf.raw_ops.ResourceScatterUpdate(
        resource=array.handle, indices=rows * stride + writes[:, 2:], updates=tf.cast(new, array.dtype)[:, :, None]
    )
    return joined


def behind_zeros(x: _Tensor, rows: int) -> _Tensor:
    """Inputs [B, T, C] behind ``rows`` zeros: as at a sequence's start."""
    return tf.pad(x, ((0, 0), (rows, 0), (0, 0)))


def note_context(x: _Tensor, rows: int, layer: int | None) -> LayerSpec:
    """What a convolution over inputs [B, T, C] stores, in the model's own dtype whatever K and V are stored in."""
    if len(x.shape) != 3 or x.shape[2] is None:
        name = "" if layer is None else f" of layer {layer}"
        raise InvalidInput(f"x{name} must be [B, T, C] with C known, got {tuple(x.shape)}")
    return LayerSpec.state(rows, x.shape[2], dtype_name(x.dtype))
