"""Rows that share blocks read them once: the block tables of a step as a tree, cut into levels.

A level is a range of columns of the block tables. Within it, rows with the same blocks are a group: its blocks are read
once, with the queries of all its rows stacked (the cascade of Hydragen and FlashInfer). What each level gives is merged
by its log-sum-exp, which is what one softmax over all of them gives. The last level is each row's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from kvcache_keras.kernels import Scoring

__all__ = ["LEVELS", "LEVEL_SHAPES", "Level", "attend_partly", "cut", "joined", "merged", "pack_levels"]

_Tensor = Any

LEVELS = 2
"""Shared levels that a graph may have: what all rows share (a system prompt), and what some do (a conversation, the
past of beams). A deeper tree is cut where the fewest blocks are read."""

LEVEL_SHAPES: tuple[list[int | None], ...] = ([None, None], [None, None], [None])
"""Shapes of what :func:`pack_levels` returns for each level."""

Cuts = tuple[int, ...]
"""Per shared level, the column of the block tables that it ends before."""


def cut(blocks: NDArray[Any]) -> tuple[Cuts, int]:
    """Where to cut a table [B, W], at most :data:`LEVELS` times, and how many fewer blocks than B * W are then read.

    Example:
        >>> cut(np.array([[7, 8, 1], [7, 8, 2], [7, 9, 3], [7, 9, 4]]))
        ((1, 2), 5)
        >>> cut(np.array([[7, 8, 1], [7, 8, 2]]))
        ((2,), 2)
    """
    rows = len(blocks)
    distinct = 1 + np.count_nonzero(np.diff(np.sort(blocks, axis=0), axis=0), axis=0)
    # Rows that differ in a column are taken to differ behind it too: of a tree that is so.
    groups = np.maximum.accumulate(distinct)
    last = np.flatnonzero(np.diff(groups, append=rows))  # columns behind which there are more groups
    ends, spared = np.append(0, last + 1), np.append(0, rows - groups[last])
    # First a level up to each end alone, then another one behind it.
    gain = ends[:, None] * spared[:, None] + np.maximum(ends[None, :] - ends[:, None], 0) * spared[None, :]
    first, second = np.unravel_index(int(gain.argmax()), gain.shape)
    cuts = sorted({int(ends[first]), int(ends[max(first, second)])} - {0})
    return tuple(cuts), int(gain.max())


def pack_levels(blocks: NDArray[Any], cuts: Cuts) -> list[NDArray[Any]]:
    """Per shared level of a table [B, W]: blocks [G, W'], the groups' rows [G, R], and each row's place in these [B].

    Groups with fewer rows than R name their first one again.

    Example:
        >>> pack_levels(np.array([[7, 8, 1], [7, 8, 2], [7, 9, 3]]), (1, 2))[3:]
        [array([[8],
               [9]]), array([[0, 1],
               [2, 2]]), array([0, 1, 2])]
    """
    arrays: list[NDArray[Any]] = []
    for begin, end in zip((0, *cuts), cuts, strict=False):
        part = np.ascontiguousarray(blocks[:, begin:end])
        groups: dict[bytes, list[int]] = {}
        for row in range(len(part)):
            groups.setdefault(part[row].tobytes(), []).append(row)
        widest = max(map(len, groups.values()))
        members = np.array([rows + rows[:1] * (widest - len(rows)) for rows in groups.values()])
        places = np.zeros(len(part), np.int64)
        for number, rows in enumerate(groups.values()):
            places[rows] = number * widest + np.arange(len(rows))
        arrays += [part[members[:, 0]], members, places]
    return arrays


def attend_partly(q: _Tensor, k: _Tensor, v: _Tensor, mask: _Tensor | None, scoring: Scoring) -> _Tensor:
    """Attention over some of the keys, for :func:`merged`.

    Args:
        q: [G, H, M, D], scaled.
        k: [G, H, S, D].
        v: [G, H, S, Dv].
        mask: bool [G, 1, M or 1, S] of what is visible.
        scoring: softcap.

    Returns:
        [G, H, M, Dv + 2], in float32 at least: the values' sum with weights exp(score - highest score), the sum of
        these weights, and the highest score.
    """
    scores = scoring.capped(tf.matmul(q, k, transpose_b=True))
    # A choice, not a sum: what is not visible may hold anything, NaN included.
    scores = tf.where(mask, scores, tf.constant(scores.dtype.min, scores.dtype))
    top = tf.reduce_max(scores, axis=-1, keepdims=True)
    weights = tf.exp(scores - top)
    values = tf.matmul(tf.cast(weights, v.dtype), v)
    return joined(values, tf.reduce_sum(weights, axis=-1, keepdims=True), top)


def joined(values: _Tensor, total: _Tensor, top: _Tensor) -> _Tensor:
    """What :func:`attend_partly` returns, of its parts."""
    return tf.concat((tf.cast(values, top.dtype), total, top), axis=-1)


def merged(partials: Sequence[_Tensor]) -> _Tensor:
    """What one softmax over the keys of all parts gives, [B, H, M, Dv]."""
    size = partials[0].shape[-1] - 2
    sums, top = tf.split(tf.stack(partials), (size + 1, 1), axis=-1)
    shares = tf.exp(top - tf.reduce_max(top, axis=0))
    values, total = tf.split(tf.reduce_sum(shares * sums, axis=0), (size, 1), axis=-1)
    return values / total


@dataclass(frozen=True)
class Level:
    """One shared level of a step: which rows read which blocks together.

    Attributes:
        blocks: int32 [G, W].
        members: int32 [G, R], the rows of each group.
        places: int32 [B], each row's place among the G * R.
        first: int32 [B], position of each row's first token in the level.
    """

    blocks: _Tensor
    members: _Tensor
    places: _Tensor
    first: _Tensor

    def stacked(self, x: _Tensor) -> _Tensor:
        """Rows [B, H, M, D] as groups [G, H, R * M, D]."""
        _, heads, many, size = x.shape
        groups, each = tf.unstack(tf.shape(self.members))
        rows = tf.transpose(tf.gather(x, self.members), (0, 2, 1, 3, 4))
        return tf.reshape(rows, (groups, heads, each * many, size))

    def unstacked(self, x: _Tensor, many: int) -> _Tensor:
        """The reverse of :meth:`stacked`, M = ``many``."""
        _, heads, _, size = x.shape
        groups, each = tf.unstack(tf.shape(self.members))
        rows = tf.transpose(tf.reshape(x, (groups, heads, each, many, size)), (0, 2, 1, 3, 4))
        return tf.gather(tf.reshape(rows, (groups * each, heads, many, size)), self.places)

    def positions(self, block_size: int) -> _Tensor:
        """int32 [B, S]: where the level's tokens stand in each row."""
        return self.first[:, None] + tf.range(tf.shape(self.blocks)[1] * block_size)

    def mask(self, positions: _Tensor, known: _Tensor, window: int | None, many: int, block_size: int) -> _Tensor:
        """Bool [G, 1, R * M, S] of what the groups' rows see of the level.

        Args:
            positions: int32 [B, 1], of the rows' tokens.
            known: int32 [B, 1], the last position whose K and V are in the level's blocks.
            window: of the layers.
            many: M, queries per row.
            block_size: tokens per block.
        """
        keys = self.positions(block_size)
        mask = keys <= known
        if window is not None:
            mask &= keys > positions - window
        return tf.repeat(tf.gather(mask, self.members), many, axis=1)[:, None]
