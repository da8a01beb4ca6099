"""Free blocks, handed out in runs of adjacent ids."""

from __future__ import annotations

from collections import deque

import numpy as np

from kvcache_core.types import BlockArray

__all__ = ["FreeRuns"]

_LOOK = 8
"""Entries of the queue that are looked at for a run of the wanted length."""


class FreeRuns:
    """Which of the ids 1 .. num_blocks are free; gives them out in adjacent runs.

    A byte per block says whether it is free, so a run's end is one search in bytes, however long the run
    is. A queue holds where runs start. An entry may be out of date (its block was taken as the neighbour
    of another); it is skipped when it comes up.

    Invariants:
        - ``count`` blocks are free.
        - from every free block down, the free blocks lead to one that stands in the queue.

    Args:
        num_blocks: ids go from 1 to this.
        used: those that are not free, without repeats.
    """

    def __init__(self, num_blocks: int, used: BlockArray | None = None) -> None:
        self.num_blocks = num_blocks
        self._free = bytearray(b"\1") * (num_blocks + 1)
        self._free[0] = 0
        if used is not None:
            np.frombuffer(self._free, np.uint8)[used] = 0
        self.count = num_blocks - (0 if used is None else len(used))
        free = np.frombuffer(self._free, np.uint8)
        starts = [1] if used is None else (np.flatnonzero((free[1:] == 1) & (free[:-1] == 0)) + 1).tolist()
        self._starts = deque(starts)
        self._queued = set(starts)

    def __contains__(self, block: int) -> bool:
        """Whether this block is free."""
        return self._free[block] == 1

    def take_behind(self, block: int, limit: int) -> list[int]:
        """Adjacent free blocks from ``block + 1`` on, at most ``limit``; often none."""
        start = block + 1
        if start > self.num_blocks or not self._free[start]:
            return []
        return self._take(start, limit)

    def take_run(self, limit: int) -> list[int]:
        """A run of adjacent free blocks, at most ``limit``; there must be a free block.

        A run that holds all of ``limit`` comes first, if one of the next few in the queue does.
        """
        starts, free = self._starts, self._free
        while not free[starts[0]]:
            self._queued.discard(starts.popleft())
        for at in range(min(_LOOK, len(starts))):
            if free[starts[at]] and self.longest(starts[at], limit) == limit:
                break
        else:
            at = 0
        start = starts[at]
        del starts[at]
        self._queued.discard(start)
        return self._take(start, limit)

    def put(self, blocks: BlockArray) -> None:
        """Make blocks free; given in any order."""
        if not len(blocks):
            return
        ordered = np.sort(blocks)
        edges = np.flatnonzero(np.diff(ordered) != 1) + 1
        firsts, lasts = ordered[[0, *edges]].tolist(), ordered[[*(edges - 1), -1]].tolist()
        for first, last in zip(firsts, lasts, strict=True):
            self._free[first : last + 1] = b"\1" * (last + 1 - first)
            self._queue(first, in_front=False)
        self.count += len(ordered)

    def longest(self, start: int, limit: int) -> int:
        """How many blocks are free from ``start`` on, counted up to ``limit``."""
        end = self._free.find(0, start, start + limit)
        return (min(start + limit, self.num_blocks + 1) if end < 0 else end) - start

    def blocks(self) -> list[int]:
        """All free blocks, ascending."""
        found: list[int] = np.flatnonzero(np.frombuffer(self._free, np.uint8)).tolist()
        return found

    def check_valid(self) -> None:
        """Assert every invariant of the class docstring; expensive, for tests."""
        free = self.blocks()
        assert len(free) == self.count
        assert self._queued == set(self._starts) and len(self._queued) == len(self._starts)
        reached = set()
        for block in free:
            if block in self._queued or block - 1 in reached:
                reached.add(block)
        assert reached == set(free)

    def _take(self, start: int, limit: int) -> list[int]:
        end = start + self.longest(start, limit)
        self._free[start:end] = bytes(end - start)
        self.count -= end - start
        if end <= self.num_blocks and self._free[end]:
            self._queue(end, in_front=True)
        return list(range(start, end))

    def _queue(self, start: int, *, in_front: bool) -> None:
        if start not in self._queued:
            self._queued.add(start)
            (self._starts.appendleft if in_front else self._starts.append)(start)
