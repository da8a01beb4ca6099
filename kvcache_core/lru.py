"""The order in which blocks were let go of: which one is evicted next."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvcache_core.sharing import UseClock
from kvcache_core.types import BlockArray, view

__all__ = ["ReleaseQueue"]


class ReleaseQueue:
    """A queue of releases in which a block may stand several times; its last entry counts.

    Each queued block knows the place of that entry (its stamp); an entry whose block has another stamp no longer
    counts. So a block leaves the order by losing its stamp, and every operation is constant time per block, amortised.

    Invariants:
        - ``count`` blocks have a stamp, and the queue has each of them at that place.

    Args:
        num_blocks: ids go from 1 to this.
        clock: if given, each entry has the time of its release, and :meth:`oldest` and :meth:`before` can be asked.
    """

    def __init__(self, num_blocks: int, clock: UseClock | None = None) -> None:
        self.count = 0
        # Zero pages: what is never used takes no memory. The views make single entries as cheap as a list's.
        self._stamps: BlockArray = np.zeros(num_blocks + 1, np.int32)
        self._entries: BlockArray = np.zeros(2 * num_blocks + 65, np.int32)
        self._stamp_at, self._entry_at = view(self._stamps), view(self._entries)
        self._clock = clock
        self._times = np.zeros(0 if clock is None else len(self._entries), np.int64)
        self._head = self._tail = 1

    def __contains__(self, block: int) -> bool:
        """Whether this block is in the queue."""
        return self._stamp_at[block] != 0

    def push(self, blocks: BlockArray, times: NDArray[np.int64] | None = None) -> None:
        """Put blocks at the end, the first one to be evicted first; ``times`` are theirs if they come from a queue."""
        if self._tail + len(blocks) > len(self._entries):
            order, known = self.order(), self.times()
            self._head = self._tail = 1
            self._place(order, known)
        self._place(blocks, times)
        self.count += len(blocks)

    def renew(self, blocks: BlockArray) -> None:
        """Put queued blocks, each given once, at the end."""
        self.push(blocks)
        self.count -= len(blocks)

    def remove(self, blocks: BlockArray) -> None:
        """Take queued blocks, each given once, out of the order."""
        self._stamps.put(blocks, 0)
        self.count -= len(blocks)

    def pop(self, count: int) -> BlockArray:
        """Take the first ``count`` blocks, one or more, out of the order; there must be as many."""
        blocks = self._pop_some(count)
        while missing := count - len(blocks):
            blocks = np.concatenate([blocks, self._pop_some(missing)])
        self.remove(blocks)
        return blocks

    def pop_one(self) -> int:
        """:meth:`pop` one block."""
        entries, stamps, at = self._entry_at, self._stamp_at, self._head
        block: int = entries[at]
        while stamps[block] != at:
            at += 1
            block = entries[at]
        self._head = at + 1
        stamps[block] = 0
        self.count -= 1
        return block

    def order(self) -> BlockArray:
        """The queued blocks, next to be evicted first."""
        return self._counting(self._tail)

    # ---- with a clock --------------------------------------------------------------------------

    def times(self) -> NDArray[np.int64] | None:
        """When each block of :meth:`order` was let go of; None without a clock."""
        return None if self._clock is None else self._times[self._stamps[self.order()]]

    def oldest(self) -> int | None:
        """When the block that is evicted next was let go of; None if there is no block."""
        if not self.count:
            return None
        entries, stamps, at = self._entry_at, self._stamp_at, self._head
        while stamps[entries[at]] != at:
            at += 1
        self._head = at
        return int(self._times[at])

    def time_of(self, count: int) -> int | None:
        """When the last of the next ``count`` > 0 blocks to be evicted was let go of; None if there are fewer."""
        if count == 1:
            return self.oldest()
        return None if count > self.count else int(self._times[self._stamps[self.order()[count - 1]]])

    def before(self, time: int) -> BlockArray:
        """The queued blocks that were let go of before ``time``, next to be evicted first."""
        times = self._times[self._head : self._tail]
        return self._counting(self._head + int(np.searchsorted(times, time)))

    # ---- inside --------------------------------------------------------------------------------

    def _counting(self, end: int) -> BlockArray:
        """The blocks whose entry counts, of the entries before ``end``."""
        entries = self._entries[self._head : end]
        counting: BlockArray = entries[self._stamps[entries] == np.arange(self._head, end)]
        return counting

    def _pop_some(self, limit: int) -> BlockArray:
        """The queued blocks among the next entries, at most ``limit`` > 0; they keep their stamps."""
        start, end = self._head, min(self._head + 2 * limit + 16, self._tail)
        entries = self._entries[start:end]
        counting = (self._stamps.take(entries) == np.arange(start, end, dtype=np.int32)).nonzero()[0][:limit]
        self._head = end if len(counting) < limit else start + int(counting[-1]) + 1
        found: BlockArray = entries.take(counting)
        return found

    def _place(self, blocks: BlockArray, times: NDArray[np.int64] | None) -> None:
        end = self._tail + len(blocks)
        if self._clock is not None:
            self._times[self._tail : end] = self._clock.tick(len(blocks)) if times is None else times
        self._entries[self._tail : end] = blocks
        self._stamps.put(blocks, np.arange(self._tail, end, dtype=np.int32))
        self._tail = end
