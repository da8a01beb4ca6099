"""A step's plan: everything an adapter needs to run it, as numpy arrays that are made when they are asked for."""

from __future__ import annotations

from array import array
from collections.abc import Mapping as _Mapping
from collections.abc import Sequence as _Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcache_core.sequence import Sequence
from kvcache_core.types import IntArray

__all__ = ["PAD_SLOT", "GroupPlan", "Reservation", "StepPlan"]

PAD_SLOT = 0
"""Where padding tokens write: a slot of the null block, which no real token ever reads."""


@dataclass(slots=True)
class Reservation:
    """One row of a step, as the core keeps it between plan and commit or rollback.

    Attributes:
        seq: the row's sequence.
        tokens: its new token ids.
        start: tokens the sequence has before the step.
        tables: its block tables, one per group. Entries that a plan can see never change in place (whoever
            changes one puts a new list into the sequence), so a plan's arrays may be made at any later time.
        table_lengths: how long the tables were before the step; None for a row that stays in its last block.
        copied: per group, the last block that another one replaced in the table, 0 where it stays; None if all stay.
        room: the sequence's room before the step, if the step fits in it.
        extra_keys: {position: bytes}, of the new tokens that have one.
        own_tail: whether the sequence goes on in its own last block, so that only states, which are never written over,
            were replaced.
    """

    seq: Sequence
    tokens: array[int]
    start: int
    tables: tuple[list[int], ...]
    table_lengths: list[int] | None
    copied: list[int] | None
    room: int = 0
    own_tail: bool = False
    extra_keys: _Mapping[int, bytes] | None = None


class StepPlan:
    """Everything a step needs. Rows are ragged: row b computes ``counts[b]`` tokens from ``starts[b]`` on.

    Every array is made when it is first asked for and kept, so a step that needs few of them pays for few.
    They describe the step as it was planned, also after it was committed.

    Args:
        rows: what was reserved.
        kinds: (kind, window) of each layer group that the rows use.
        block_size: tokens per block.
    """

    def __init__(self, rows: _Sequence[Reservation], kinds: _Sequence[tuple[str, int | None]], block_size: int) -> None:
        self.rows = rows
        self.kinds = kinds
        self.block_size = block_size
        self.finished = False
        """Whether the plan was committed or rolled back."""
        self.frames: NDArray[Any] | None = None
        """Float [B, T, F], padded on the right: what a model that takes frames computes instead of ``tokens``."""

    @cached_property
    def seqs(self) -> tuple[Sequence, ...]:
        """The rows' sequences."""
        return tuple(row.seq for row in self.rows)

    @cached_property
    def starts(self) -> IntArray:
        """int64 [B], tokens each row has before the step."""
        return np.array([row.start for row in self.rows], np.int64)

    @cached_property
    def counts(self) -> IntArray:
        """int64 [B], new tokens per row."""
        return np.array([len(row.tokens) for row in self.rows], np.int64)

    @cached_property
    def width(self) -> int:
        """T, the most new tokens that a row has."""
        return max(len(row.tokens) for row in self.rows)

    @cached_property
    def kv_lengths(self) -> IntArray:
        """int64 [B]: tokens each row has after the step."""
        return self.starts + self.counts

    @cached_property
    def positions(self) -> IntArray:
        """int64 [B, T], absolute positions; padding repeats the row's last position."""
        positions: IntArray = self.starts[:, None].copy()
        if self.width > 1:
            positions = np.minimum(positions + np.arange(self.width), self.kv_lengths[:, None] - 1)
        return positions

    @cached_property
    def tokens(self) -> IntArray:
        """int64 [B, T], new token ids, padded on the right with 0."""
        if self.width == 1:
            return np.array([row.tokens for row in self.rows], np.int64)
        tokens = np.zeros((len(self.rows), self.width), np.int64)
        for number, row in enumerate(self.rows):
            tokens[number, : len(row.tokens)] = row.tokens
        return tokens

    @cached_property
    def groups(self) -> tuple[GroupPlan, ...]:
        """One :class:`GroupPlan` per layer group that the sequences use, in the layout's order."""
        return tuple(GroupPlan(self, number) for number in range(len(self.kinds)))

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

    def __repr__(self) -> str:
        state = "finished" if self.finished else "open"
        return f"<StepPlan {state}, {len(self.rows)} rows, {len(self.kinds)} layer groups>"


class GroupPlan:
    """The part of a plan that belongs to one layer group (layers of the same kind, with the same window).

    Attributes:
        kind: the group's kind.
        window: the group's window in tokens, or None.
        block_size: tokens per block.
    """

    def __init__(self, plan: StepPlan, number: int) -> None:
        self._plan = plan
        self._number = number
        self.kind, self.window = plan.kinds[number]
        self.block_size = plan.block_size

    @property
    def starts(self) -> IntArray:
        """The plan's ``starts``."""
        return self._plan.starts

    @property
    def ends(self) -> IntArray:
        """The plan's ``kv_lengths``."""
        return self._plan.kv_lengths

    @cached_property
    def block_tables(self) -> NDArray[np.int32]:
        """int32 [B, blocks], block of ``position // block_size``; 0 is the null block: dropped by the window, or
        behind the end.
        """
        rows, size = self._plan.rows, self.block_size
        widths = [-(-(row.start + len(row.tokens)) // size) for row in rows]
        if len(rows) == 1:
            return np.array([rows[0].tables[self._number][: widths[0]]], np.int32)
        tables = np.zeros((len(rows), max(widths)), np.int32)
        for at, (row, width) in enumerate(zip(rows, widths, strict=True)):
            tables[at, :width] = row.tables[self._number][:width]
        return tables

    @cached_property
    def slots(self) -> IntArray:
        """int64 [B, T], where each new token's arrays are written; padding has :data:`PAD_SLOT`."""
        size, rows = self.block_size, self._plan.rows
        if self._plan.width == 1:
            tables = ((row.tables[self._number], row.start) for row in rows)
            return np.array([[table[at // size] * size + at % size] for table, at in tables], np.int64)
        positions = self._plan.positions
        blocks = np.take_along_axis(self.block_tables, positions // size, axis=1).astype(np.int64)
        padding = np.arange(positions.shape[1]) >= self._plan.counts[:, None]
        return np.where(padding, PAD_SLOT, blocks * size + positions % size)

    @cached_property
    def copies(self) -> NDArray[np.int32]:
        """int32 [C, 2], (source, destination) blocks to copy before anything is written; a state is written anew."""
        number, size = self._number, self.block_size
        if self.kind == "state":
            return np.zeros((0, 2), np.int32)
        pairs = [
            (row.copied[number], row.tables[number][row.start // size])
            for row in self._plan.rows
            if row.copied is not None and row.copied[number]
        ]
        return np.array(pairs, np.int32).reshape(-1, 2)

    @cached_property
    def state_reads(self) -> NDArray[np.int32]:
        """int32 [B], of a state group: the block with the state behind the token before the step; 0 at the start."""
        number, size = self._number, self.block_size
        found = []
        for row in self._plan.rows:
            at, offset = divmod(row.start, size)
            if offset and row.copied is not None:
                found.append(row.copied[number])
            else:
                found.append(row.tables[number][at - 1] if at else 0)
        return np.array(found, np.int32)

    @cached_property
    def state_writes(self) -> NDArray[np.int32]:
        """int32 [N, 3], of a state group: (row, new tokens, block) says that the state behind so many of the row's new
        tokens goes into the block: at the end of every block that the step fills, and behind its last token.

        No block is among :attr:`state_reads`, so a step that fails has changed no state.
        """
        size, found = self.block_size, []
        for number, row in enumerate(self._plan.rows):
            end = row.start + len(row.tokens)
            table = row.tables[self._number]
            blocks = range(row.start // size, -(-end // size))
            found += [(number, min((at + 1) * size, end) - row.start, table[at]) for at in blocks]
        return np.array(found, np.int32)

    @cached_property
    def extents(self) -> list[list[tuple[int, int, int]]]:
        """Per row: (first slot, tokens, first position) of each run of adjacent slots.

        Covers what the row's new tokens can see, the new tokens included.
        """
        return [self._row_extents(row) for row in range(len(self.ends))]

    def _row_extents(self, row: int) -> list[tuple[int, int, int]]:
        size, end = self.block_size, int(self.ends[row])
        first = 0 if self.window is None else max(0, int(self.starts[row]) - self.window + 1)
        low, high = first // size, -(-end // size)
        table = self._plan.rows[row].tables[self._number]
        start = table[low]
        # Most rows lie in one piece: seen in a tenth of the time that arrays take.
        if table[low:high] == list(range(start, start + high - low)):
            return [(start * size + first % size, end - first, first)]
        blocks = self.block_tables[row, low:high]
        breaks = (blocks[1:] != blocks[:-1] + 1).nonzero()[0] + 1
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
