"""Which rows of a step read which run of slots: what several rows share is listed, and read, once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvcache_core.plan import GroupPlan

__all__ = ["SharedExtent", "packed_extents", "past_extents", "shared_extents"]

_Extent = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class SharedExtent:
    """A run of adjacent slots that the same rows read whole.

    Attributes:
        slot: the first slot.
        size: slots, at least one.
        rows: the rows that read it, in ascending order.
    """

    slot: int
    size: int
    rows: tuple[int, ...]


def shared_extents(per_row: Iterable[Iterable[_Extent]]) -> list[SharedExtent]:
    """The rows' extents, cut where the set of readers changes: every slot once, with all rows that read it.

    Rows that branched off at different points (system prompt, conversation, samples, beams) give the levels of a
    tree: the root's piece has all rows, a leaf's has one. Nobody has to say so, the block tables do.

    Args:
        per_row: per row, (first slot, tokens, first position) of each of its extents; no row reads a slot twice.

    Returns:
        Pieces in ascending order of their slots.

    Example:
        >>> shared_extents([[(0, 8, 0), (20, 4, 8)], [(0, 6, 0), (40, 4, 6)]])
        [SharedExtent(slot=0, size=6, rows=(0, 1)), SharedExtent(slot=6, size=2, rows=(0,)), \
SharedExtent(slot=20, size=4, rows=(0,)), SharedExtent(slot=40, size=4, rows=(1,))]
    """
    changes: dict[int, list[tuple[int, bool]]] = {}
    for row, extents in enumerate(per_row):
        for slot, size, _ in extents:
            changes.setdefault(slot, []).append((row, True))
            changes.setdefault(slot + size, []).append((row, False))
    pieces: list[SharedExtent] = []
    readers: set[int] = set()
    begin = 0
    for slot in sorted(changes):
        before = tuple(sorted(readers))
        for row, starts in sorted(changes[slot], key=_ends_first):
            (readers.add if starts else readers.remove)(row)
        if before != tuple(sorted(readers)):
            if before:
                pieces.append(SharedExtent(begin, slot - begin, before))
            begin = slot
    return pieces


def _ends_first(change: tuple[int, bool]) -> bool:
    """A row whose extents happen to touch stops reading one before it starts the next."""
    return change[1]


def past_extents(group: GroupPlan) -> list[list[_Extent]]:
    """Per row, the extents of what it had before the step: ``group.extents`` without the new tokens."""
    result = []
    for extents, start in zip(group.extents, group.starts.tolist(), strict=True):
        kept = [(slot, min(size, start - first), first) for slot, size, first in extents if first < start]
        result.append(kept)
    return result


def packed_extents(per_row: Sequence[Sequence[_Extent]]) -> tuple[NDArray[np.int64], list[list[_Extent]]]:
    """All slots that the rows read, once each, and the rows' extents as they lie in a copy of these alone.

    Args:
        per_row: per row, (first slot, tokens, first position) of each of its extents.

    Returns:
        int64 [S] slots in ascending order, and the extents with their first slots counted in it.

    Example:
        >>> packed_extents([[(32, 4, 0), (80, 2, 4)], [(32, 3, 0)]])
        (array([32, 33, 34, 35, 80, 81]), [[(0, 4, 0), (4, 2, 4)], [(0, 3, 0)]])
    """
    pieces = [np.arange(slot, slot + size) for extents in per_row for slot, size, _ in extents]
    slots = np.unique(np.concatenate(pieces)) if pieces else np.zeros(0, np.int64)
    return slots, [
        [(int(np.searchsorted(slots, slot)), size, first) for slot, size, first in extents] for extents in per_row
    ]
