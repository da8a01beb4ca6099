"""A step's plan as arrays that enter a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from kvcache_core.plan import PAD_SLOT, GroupPlan, StepPlan
from kvcache_keras.levels import LEVEL_SHAPES, Cuts, cut, pack_levels
from kvcache_keras.states import STATE_SHAPES, pack_states
from kvcache_keras.store import TensorStore

__all__ = ["blocks_read", "group_shapes", "in_buckets", "pack", "shared_cuts", "signature"]

WORTH = 2_500_000
"""Bytes of K and V in one layer that sharing must spare a step from reading, to save more time than its operations
take to set up: `python tests/bench/keras_attention.py`."""


def pack(plan: StepPlan, store: TensorStore, cuts: Sequence[Cuts] = ()) -> list[NDArray[Any]]:
    """The plan as arrays, int32 but for frames, in the order that :func:`signature` says and a step reads.

    Args:
        plan: the step's.
        store: where its K and V lie.
        cuts: from :func:`shared_cuts`: what rows share is then listed once. None for row by row.
    """
    arrays: list[Any] = [plan.positions, plan.counts - 1, np.array(store.stride)]
    for number, group in enumerate(plan.groups):
        if group.kind == "state":
            arrays += pack_states(group)
            continue
        blocks, first = _visible_blocks(group)
        at = cuts[number] if cuts else ()
        begin = at[-1] if at else 0
        own = (blocks[:, begin:], first + begin * group.block_size)
        arrays += (group.slots, *own, _tail_slots(group, plan), *pack_levels(blocks, at))
    tokens = plan.tokens.astype(np.int32) if plan.frames is None else plan.frames
    return [tokens, *(array.astype(np.int32) for array in arrays)]


def shared_cuts(plan: StepPlan, store: TensorStore) -> list[Cuts]:
    """Per layer group, where to cut its tables so that rows read what they share once; equally many cuts in all groups,
    and none where that would spare little.
    """
    groups = plan.groups
    if len(plan.rows) < 2:
        return [()] * len(groups)
    found = [((), 0) if group.kind == "state" else cut(_visible_blocks(group)[0]) for group in groups]
    levels = 0
    for (cuts, spared), size in zip(found, store.bytes_per_token, strict=False):
        if spared * plan.block_size * size >= WORTH:
            levels = max(levels, len(cuts))
    return [(0,) * (levels - len(cuts)) + cuts[:levels] for cuts, _ in found]


def blocks_read(packed: Sequence[NDArray[Any]], levels: int) -> int:
    """Blocks that a packed step without state layers reads in a layer; of the layer group with the most."""
    groups, each = packed[4:], 4 + 3 * levels
    tables = (1, *range(4, each, 3))
    return max(sum(groups[at + table].size for table in tables) for at in range(0, len(groups), each))


def in_buckets(packed: Sequence[NDArray[Any]], new: int = 1) -> list[NDArray[Any]]:
    """A packed plan, its rows, tokens per row and blocks padded to powers of two: few shapes for XLA to compile.

    Tokens per row are padded to ``new`` at least. Padding is a token 0 at position 0 that is written to, and sees, the
    null block.
    """

    def padded(array: NDArray[Any], *least: int) -> NDArray[Any]:
        """The first axes padded, each to ``least`` of it at least."""
        sizes = zip(array.shape, least, strict=False)
        widths = [(0, max(wanted, 1 << (size - 1).bit_length()) - size) for size, wanted in sizes]
        return np.pad(array, widths + [(0, 0)] * (array.ndim - len(widths)))

    tokens, positions, last, stride, *groups = packed
    found = [padded(tokens, 1, new), padded(positions, 1, new), padded(last, 1), stride]
    for at in range(0, len(groups), 4):
        slots, blocks, first, tails = groups[at : at + 4]
        found += [padded(slots, 1, new), padded(blocks, 1, 1), padded(first, 1), padded(tails, 1)]
    return found


def signature(
    kinds: Sequence[str],
    block_size: int,
    new: int | None,
    frames: tuple[int, str] | None = None,
    *,
    levels: int = 0,
) -> list[tf.TensorSpec]:
    """Specs of what :func:`pack` returns.

    Args:
        kinds: of the layer groups that the step uses.
        block_size: tokens per block.
        new: T, or None for any.
        frames: (F, dtype) of a model that takes frames.
        levels: into how many levels of what rows share the tables are cut.
    """
    tokens = tf.TensorSpec([None, new], tf.int32)
    if frames is not None:
        tokens = tf.TensorSpec([None, new, frames[0]], "float64" if frames[1] == "float64" else "float32")
    shapes: list[Any] = [[None, new], [None], []]
    for kind in kinds:
        shapes += group_shapes(kind, block_size, new, levels=levels)
    return [tokens, *(tf.TensorSpec(shape, tf.int32) for shape in shapes)]


def group_shapes(kind: str, block_size: int, new: int | None, *, levels: int) -> Sequence[list[int | None]]:
    """Shapes of what stands for a layer group in a packed plan."""
    if kind == "state":
        return STATE_SHAPES
    return [[None, new], [None, None], [None], [None, block_size], *(LEVEL_SHAPES * levels)]


def _visible_blocks(group: GroupPlan) -> tuple[NDArray[Any], NDArray[Any]]:
    """[B, blocks] block ids that the new tokens can see, and [B] the position of the first one's first token."""
    size, table = group.block_size, group.block_tables
    if group.window is None:
        return table, np.zeros(len(table), np.int32)
    low = np.maximum(0, group.starts - group.window + 1) // size
    width = int((-(-group.ends // size) - low).max())
    columns = low[:, None] + np.arange(width)
    inside = columns < table.shape[1]
    blocks = np.take_along_axis(table, np.where(inside, columns, 0), axis=1)
    return np.where(inside, blocks, 0), low * size


def _tail_slots(group: GroupPlan, plan: StepPlan) -> NDArray[Any]:
    """[B, block_size] slots of each row's last block behind its last token; :data:`PAD_SLOT` elsewhere."""
    last = np.take_along_axis(group.slots, plan.counts[:, None] - 1, axis=1)
    offsets = np.arange(group.block_size)
    return np.where(offsets > last % group.block_size, last - last % group.block_size + offsets, PAD_SLOT)
