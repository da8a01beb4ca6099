"""Block ids: who is free, cached or live, and which cached block goes next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvcache_core.errors import BlockError, CacheFull, InvalidInput
from kvcache_core.runs import FreeRuns
from kvcache_core.types import NULL_BLOCK, BlockArray, BlockId, view

__all__ = ["BlockPool", "PoolResize", "check_size"]


@dataclass(frozen=True, slots=True)
class PoolResize:
    """What a resize or a compaction did: evicted blocks (old ids) and the moves old id -> new id."""

    evicted: list[BlockId]
    moves: dict[BlockId, BlockId]


class BlockPool:
    """Reference counts and LRU order over the block ids 1 .. num_blocks. Knows no tokens and no tensors.

    A block is *free* (nobody holds it, nothing to find in it), *cached* (nobody holds it, its content can
    be found) or *live* (held by one or more block tables).

    The LRU order is a queue of releases in which a block may stand several times. Each cached block knows
    the place of its last entry (its stamp); an entry whose block has another stamp no longer counts. So a
    block leaves the order by losing its stamp, every operation is constant time per block, amortised, and
    whole tables are handled as arrays.

    Invariants:
        - free + cached + live == num_blocks.
        - a free block has no references and no findable content, and stands in :class:`FreeRuns`.
        - a block has a stamp exactly if it is cached, and the queue has it at that place.

    Args:
        num_blocks: usable blocks; id 0, the null block, comes on top.
    """

    def __init__(self, num_blocks: int) -> None:
        check_size(num_blocks)
        self.num_blocks = num_blocks
        self.num_cached = 0
        self.free = FreeRuns(num_blocks)
        self._allocate(num_blocks)

    def _allocate(self, num_blocks: int) -> None:
        # Zero pages: what is never used takes no memory. The views make single entries as cheap as a list's.
        self._refs: BlockArray = np.zeros(num_blocks + 1, np.int32)
        self._findable = np.zeros(num_blocks + 1, np.bool_)
        self._stamp: BlockArray = np.zeros(num_blocks + 1, np.int32)
        self._queue: BlockArray = np.zeros(2 * num_blocks + 65, np.int32)
        self._head = self._tail = 1
        self.ref = view(self._refs)
        self._findable_at = view(self._findable)
        self._stamp_at = view(self._stamp)
        self._queue_at = view(self._queue)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds and nothing can be found in."""
        return self.free.count

    @property
    def num_live(self) -> int:
        """Blocks held by at least one block table."""
        return self.num_blocks - self.free.count - self.num_cached

    @property
    def num_available(self) -> int:
        """Blocks that can be taken: free ones and evictable ones."""
        return self.free.count + self.num_cached

    def refs(self, block: int) -> int:
        """How many block tables hold ``block``."""
        self._check_known(block)
        return int(self._refs[block])

    def is_findable(self, block: int) -> bool:
        """Whether the block's content can be found by a prefix match."""
        return bool(self._findable[block])

    # ---- taking and giving back ----------------------------------------------------------------

    def take(self, count: int, after: int = NULL_BLOCK) -> tuple[list[int], list[int]]:
        """Take ``count`` blocks for one sequence, each with one reference.

        The block right behind ``after`` comes first if it is free, then runs of free blocks, then the
        least recently used cached blocks; so a sequence's slots are adjacent where that is possible.

        Returns:
            The taken ids in the order to use them, and those of them whose content was evicted, least
            recently used first.

        Raises:
            CacheFull: fewer than ``count`` blocks are free or cached; nothing was changed.
        """
        free = self.free
        if count > free.count + self.num_cached:
            raise CacheFull(
                f"need {count} blocks, {free.count} free + {self.num_cached} evictable of "
                f"{self.num_blocks}; close sequences or resize the cache",
                needed=count,
                available=self.num_available,
                capacity=self.num_blocks,
            )
        if count == 1:
            return self._take_one(after)
        taken = free.take_behind(after, count) if after else []
        rest: list[int] = []
        while len(taken) + len(rest) < count and free.count:
            rest += free.take_run(count - len(taken) - len(rest))
        missing = count - len(taken) - len(rest)
        evicted = self._evict(missing) if missing else []
        # Blocks of one old sequence come tail first; sorted they are adjacent again.
        taken += sorted(rest + evicted)
        self._refs[taken] = 1
        return taken, evicted

    def _take_one(self, after: int) -> tuple[list[int], list[int]]:
        free, evicted = self.free, []
        taken = (free.take_behind(after, 1) if after else []) or (free.take_run(1) if free.count else [])
        if not taken:
            taken = evicted = self._evict(1)
        self.ref[taken[0]] = 1
        return taken, evicted

    def retain(self, blocks: Sequence[int] | BlockArray) -> None:
        """Add one reference to each block; null blocks are skipped.

        Raises:
            BlockError: a block is unknown or free; nothing was changed.
        """
        held = self._checked(blocks)
        fresh = held[self._refs[held] == 0]
        if fresh.size:
            findable = self._findable[fresh]
            if not findable.all():
                block = fresh[np.argmin(findable)]
                raise BlockError(f"block {block} is free: it cannot be retained; take it from the pool first")
            self._stamp[fresh] = 0
            self.num_cached -= len(set(fresh.tolist()))
        self._add(held, 1)

    def release(self, blocks: Sequence[int] | BlockArray) -> None:
        """Drop one reference of each block of one sequence, given head first; null blocks are skipped.

        A block nobody holds any more becomes cached if its content can be found, else free. The tail
        enters the LRU order before the head, so that a chain never loses its start first.

        Raises:
            BlockError: a block is unknown, or has fewer references than it is released; nothing was changed.
        """
        held = self._checked(blocks)
        self._add(held, -1)
        left = self._refs[held]
        if left.size and left.min() < 0:
            self._add(held, 1)
            raise BlockError(f"block {held[left.argmin()]} was released more often than it was retained")
        gone = held[left == 0][::-1]
        if not gone.size:
            return
        findable = self._findable[gone]
        if findable.all():
            self._enqueue(gone)
            return
        self.free.put(gone[~findable])
        self._enqueue(gone[findable])

    def mark_findable(self, block: int) -> None:
        """Keep the content of a live block when its last reference goes.

        Raises:
            BlockError: the block is not live.
        """
        if self.ref[block] < 1:
            raise BlockError(f"block {block} is not live: only a held block can become findable")
        self._findable_at[block] = True

    def mark_all_findable(self, blocks: BlockArray) -> None:
        """:meth:`mark_findable` many blocks."""
        if self._refs[blocks].min() < 1:
            self.mark_findable(int(blocks[self._refs[blocks].argmin()]))
        self._findable[blocks] = True

    def unmark_findable(self, block: int) -> None:
        """Forget the content; a cached block becomes free."""
        if self._findable[block]:
            self._findable[block] = False
            if self._stamp[block]:
                self._stamp[block] = 0
                self.num_cached -= 1
                self.free.put(np.array([block], np.int32))

    def drop_cached(self) -> list[int]:
        """Evict every cached block; returns their ids, which are free now."""
        return self.evict(self.num_cached)

    def evict(self, count: int) -> list[int]:
        """Evict the ``count`` least recently used cached blocks, or all if there are fewer; they are free now."""
        evicted = self._evict(min(count, self.num_cached))
        self.free.put(np.array(evicted, np.int32))
        return evicted

    def lru_order(self) -> list[int]:
        """The cached blocks, next to be evicted first."""
        entries = self._queue[self._head : self._tail]
        counts = self._stamp[entries] == np.arange(self._head, self._tail)
        order: list[int] = entries[counts].tolist()
        return order

    # ---- other sizes and places ----------------------------------------------------------------

    def resize(self, num_blocks: int) -> PoolResize:
        """Change the capacity while blocks are in use.

        Shrinking evicts cached blocks, least recently used first, and moves what is left under the new
        limit; the caller renames the moved ids in its tables and moves the bytes.

        Raises:
            CacheFull: more blocks are live than ``num_blocks``; nothing was changed.
        """
        check_size(num_blocks)
        if num_blocks < self.num_live:
            raise CacheFull(
                f"cannot shrink to {num_blocks} blocks: {self.num_live} of {self.num_blocks} are live; "
                "close sequences first",
                needed=self.num_live,
                available=num_blocks,
                capacity=self.num_blocks,
            )
        surplus = self.num_live + self.num_cached - num_blocks
        evicted = self._evict(surplus) if surplus > 0 else []
        self.free.put(np.array(evicted, np.int32))
        used = self.used()
        homeless = used[used > num_blocks]
        taken = np.zeros(num_blocks + 1, np.bool_)
        taken[used[used <= num_blocks]] = True
        taken[0] = True
        holes = np.flatnonzero(~taken)[: len(homeless)]
        moves = {BlockId(old): BlockId(new) for old, new in zip(homeless.tolist(), holes.tolist(), strict=True)}
        self.move(moves, num_blocks)
        return PoolResize([BlockId(block) for block in evicted], moves)

    def used(self) -> BlockArray:
        """The blocks that are not free, ascending."""
        return np.flatnonzero((self._refs > 0) | self._findable).astype(np.int32)

    def move(self, moves: dict[BlockId, BlockId], num_blocks: int) -> None:
        """Rename used blocks, in a pool of ``num_blocks`` from now on; the targets are free, or moved away too."""
        used = self.used()
        renamed = np.array([moves.get(block, block) for block in used.tolist()], np.int32)
        names = np.zeros(self.num_blocks + 1, np.int32)
        names[used] = renamed
        order = names[self.lru_order()]
        refs, findable = self._refs[used], self._findable[used]
        self._allocate(num_blocks)
        self._refs[renamed], self._findable[renamed] = refs, findable
        self.num_cached = 0
        self.num_blocks = num_blocks
        self._enqueue(order)
        self.free = FreeRuns(num_blocks, used=renamed)

    def check_valid(self) -> None:
        """Assert every invariant of the class docstring; expensive, for tests."""
        refs, findable = self._refs[1:], self._findable[1:]
        free, cached = (refs == 0) & ~findable, (refs == 0) & findable
        assert np.count_nonzero(free) == self.num_free and np.count_nonzero(cached) == self.num_cached
        assert np.count_nonzero(refs) == self.num_live and not np.any(refs < 0)
        assert self.free.blocks() == (np.flatnonzero(free) + 1).tolist()
        assert np.array_equal(self._stamp[1:] > 0, cached)
        assert sorted(self.lru_order()) == (np.flatnonzero(cached) + 1).tolist()
        self.free.check_valid()

    # ---- inside --------------------------------------------------------------------------------

    def _add(self, blocks: BlockArray, change: int) -> None:
        if len(set(blocks.tolist())) == len(blocks):
            self._refs[blocks] += change
        else:
            np.add.at(self._refs, blocks, change)

    def _evict(self, count: int) -> list[int]:
        """The ``count`` least recently used cached blocks: no longer findable, not yet free."""
        if count == 1:
            return [self._evict_one()]
        evicted: list[int] = []
        while len(evicted) < count:
            missing = count - len(evicted)
            end = min(self._head + 2 * missing + 16, self._tail)
            entries = self._queue[self._head : end]
            counting = np.flatnonzero(self._stamp[entries] == np.arange(self._head, end))[:missing]
            self._head = end if len(counting) < missing else self._head + int(counting[-1]) + 1
            evicted += entries[counting].tolist()
        self._stamp[evicted] = 0
        self._findable[evicted] = False
        self.num_cached -= count
        return evicted

    def _evict_one(self) -> int:
        queue, stamp, at = self._queue_at, self._stamp_at, self._head
        while stamp[queue[at]] != at:
            at += 1
        self._head = at + 1
        block: int = queue[at]
        stamp[block] = 0
        self._findable_at[block] = False
        self.num_cached -= 1
        return block

    def _enqueue(self, blocks: BlockArray) -> None:
        end = self._tail + len(blocks)
        if end > len(self._queue):
            order = self.lru_order()
            self._head = self._tail = 1
            self._place(np.array(order, np.int32))
            end = self._tail + len(blocks)
        self._place(blocks)
        self.num_cached += len(blocks)

    def _place(self, blocks: BlockArray) -> None:
        end = self._tail + len(blocks)
        self._queue[self._tail : end] = blocks
        self._stamp[blocks] = np.arange(self._tail, end)
        self._tail = end

    def _checked(self, blocks: Sequence[int] | BlockArray) -> BlockArray:
        """The blocks that are not null, as an array."""
        found: BlockArray = np.array(blocks, np.int32)
        if found.size and found.view(np.uint32).max() > self.num_blocks:
            self._check_known(next(block for block in found.tolist() if not 0 <= block <= self.num_blocks))
        return found if found.all() else found[found != 0]

    def _check_known(self, block: int) -> None:
        if not 1 <= block <= self.num_blocks:
            raise BlockError(f"block {block} is unknown: ids are 1 .. {self.num_blocks}")


def check_size(num_blocks: int) -> None:
    """Raise InvalidInput unless ``num_blocks`` can be the size of a pool."""
    if isinstance(num_blocks, bool) or not isinstance(num_blocks, int) or num_blocks < 1:
        raise InvalidInput(f"a pool needs a whole number of blocks, at least 1; got {num_blocks!r}")
