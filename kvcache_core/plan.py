"""A step's plan: everything an adapter needs to run it, as numpy arrays."""

from __future__ import annotations

from collections.abc import Sequence as _Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from kvcache_core.sequence import Sequence
from kvcache_core.types import IntArray

__all__ = ["PAD_SLOT", "GroupPlan", "Reservation", "StepPlan", "make_plan"]

PAD_SLOT = 0
"""Where padding tokens write: a slot of the null block, which no real token ever reads."""


@dataclass(slots=True)
class Reservation:
    """One row of a step, as the core keeps it between plan and commit or rollback."""

    seq: Sequence
    tokens: memoryview
    table_lengths: list[int]
    copied: list[int] | None
    """Per group, the shared block that a copy replaced in the table."""


@dataclass(frozen=True)
class GroupPlan:
    """The part of a plan that belongs to one layer group (layers with the same window).

    Attributes:
        window: the group's window in tokens, or None.
        slots: int64 [B, T], where each new token's arrays are written; padding has :data:`PAD_SLOT`.
        block_tables: int32 [B, blocks], block of ``position // block_size``; 0 is the null block: dropped
            by the window, or behind the end.
        copies: int32 [C, 2], (source, destination) blocks to copy before anything is written.
    """

    window: int | None
    block_size: int
    starts: IntArray
    ends: IntArray
    slots: IntArray
    block_tables: NDArray[np.int32]
    copies: NDArray[np.int32]

    @cached_property
    def extents(self) -> list[list[tuple[int, int, int]]]:
        """Per row: (first slot, tokens, first position) of each run of adjacent slots.

        Covers what the row's new tokens can see, the new tokens included.
        """
        return [self._row_extents(row) for row in range(len(self.ends))]

    def _row_extents(self, row: int) -> list[tuple[int, int, int]]:
        size, end = self.block_size, int(self.ends[row])
        first = 0 if self.window is None else max(0, int(self.starts[row]) - self.window + 1)
        low = first // size
        blocks = self.block_tables[row, low : -(-end // size)]
        breaks = np.flatnonzero(np.diff(blocks) != 1) + 1
        edges = [0, *breaks.tolist(), len(blocks)]
        runs = []
        for left, right in pairwise(edges):
            begin = max((low + left) * size, first)
            stop = min((low + right) * size, end)
            runs.append((int(blocks[left]) * size + begin - (low + left) * size, stop - begin, begin))
        return runs

    @cached_property
    def kv_indptr(self) -> NDArray[np.int32]:
        """int32 [B + 1]: row r's blocks are ``kv_indices[kv_indptr[r]:kv_indptr[r + 1]]`` (FlashInfer)."""
        return np.concatenate([[0], np.cumsum(self._blocks_per_row)]).astype(np.int32)

    @cached_property
    def kv_indices(self) -> NDArray[np.int32]:
        """int32: the block tables of all rows behind each other (FlashInfer)."""
        width = self.block_tables.shape[1]
        used = np.arange(width)[None, :] < self._blocks_per_row[:, None]
        return self.block_tables[used]

    @cached_property
    def kv_last_page_len(self) -> NDArray[np.int32]:
        """int32 [B]: tokens in each row's last block (FlashInfer)."""
        return ((self.ends - 1) % self.block_size + 1).astype(np.int32)

    @property
    def _blocks_per_row(self) -> IntArray:
        return -(-self.ends // self.block_size)


@dataclass(frozen=True)
class StepPlan:
    """Everything a step needs. Rows are ragged: row b computes ``counts[b]`` tokens from ``starts[b]`` on.

    Attributes:
        seqs: the rows' sequences.
        tokens: int64 [B, T], new token ids, padded on the right with 0.
        positions: int64 [B, T], absolute positions; padding repeats the row's last position.
        starts: int64 [B], tokens each row has before the step.
        counts: int64 [B], new tokens per row.
        groups: one :class:`GroupPlan` per layer group that the sequences use, in the layout's order.
    """

    seqs: tuple[Sequence, ...]
    tokens: IntArray
    positions: IntArray
    starts: IntArray
    counts: IntArray
    groups: tuple[GroupPlan, ...]
    reservations: list[Reservation] = field(repr=False, default_factory=list)

    @property
    def kv_lengths(self) -> IntArray:
        """int64 [B]: tokens each row has after the step."""
        return self.starts + self.counts

    @property
    def slots(self) -> IntArray:
        """``groups[0].slots``."""
        return self.groups[0].slots

    @property
    def block_tables(self) -> NDArray[np.int32]:
        """``groups[0].block_tables``."""
        return self.groups[0].block_tables

    @property
    def copies(self) -> NDArray[np.int32]:
        """``groups[0].copies``."""
        return self.groups[0].copies

    @property
    def kv_indptr(self) -> NDArray[np.int32]:
        """``groups[0].kv_indptr``."""
        return self.groups[0].kv_indptr

    @property
    def kv_indices(self) -> NDArray[np.int32]:
        """``groups[0].kv_indices``."""
        return self.groups[0].kv_indices

    @property
    def kv_last_page_len(self) -> NDArray[np.int32]:
        """``groups[0].kv_last_page_len``."""
        return self.groups[0].kv_last_page_len


def make_plan(rows: _Sequence[Reservation], windows: _Sequence[int | None], block_size: int) -> StepPlan:
    """Turn reserved rows into arrays. Reads the sequences' tables; changes nothing."""
    starts = np.array([row.seq.length for row in rows], np.int64)
    counts = np.array([len(row.tokens) for row in rows], np.int64)
    ends = starts + counts
    steps = np.arange(counts.max())
    positions = starts[:, None] + steps
    padding = positions >= ends[:, None]
    positions = np.minimum(positions, ends[:, None] - 1)
    tokens = np.zeros(positions.shape, np.int64)
    for number, row in enumerate(rows):
        tokens[number, : len(row.tokens)] = row.tokens
    width = -(-int(ends.max()) // block_size)
    groups = []
    for number, window in enumerate(windows):
        tables = np.zeros((len(rows), width), np.int32)
        copies = []
        for at, row in enumerate(rows):
            table = row.seq.tables[number]
            tables[at, : min(len(table), width)] = table[:width]
            if row.copied is not None:
                copies.append((row.copied[number], table[row.seq.length // block_size]))
        blocks = np.take_along_axis(tables, positions // block_size, axis=1).astype(np.int64)
        slots = np.where(padding, PAD_SLOT, blocks * block_size + positions % block_size)
        tables[np.arange(width) >= -(-ends[:, None] // block_size)] = 0
        pairs = np.array(copies, np.int32).reshape(-1, 2)
        groups.append(GroupPlan(window, block_size, starts, ends, slots, tables, pairs))
    seqs = tuple(row.seq for row in rows)
    return StepPlan(seqs, tokens, positions, starts, counts, tuple(groups), list(rows))
