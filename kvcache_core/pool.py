"""Block ids: who is free, cached or live, and which cached block goes next."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvcache_core.errors import BlockError, CacheFull
from kvcache_core.inputs import check_size
from kvcache_core.lru import ReleaseQueue
from kvcache_core.runs import FreeRuns
from kvcache_core.sharing import UseClock
from kvcache_core.types import NULL_BLOCK, BlockArray, BlockId, PoolResize, id_array, view

__all__ = ["BlockPool"]


class BlockPool:
    """Reference counts and LRU order over the block ids 1 .. num_blocks. Knows no tokens and no tensors.

    A block is *free* (nobody holds it, nothing to find in it), *cached* (nobody holds it, its content can
    be found) or *live* (held by one or more block tables).

    Every operation is constant time per block, amortised; whole tables are handled as arrays.

    Invariants:
        - free + cached + live == num_blocks.
        - a free block has no references and no findable content, and stands in :class:`FreeRuns`.
        - a block stands in the :class:`ReleaseQueue` exactly if it is cached.

    Args:
        num_blocks: usable blocks; id 0, the null block, comes on top.
        clock: what this pool's releases share an order with.
    """

    def __init__(self, num_blocks: int, clock: UseClock | None = None) -> None:
        check_size(num_blocks)
        self.num_blocks = num_blocks
        self._clock = clock
        self.free = FreeRuns(num_blocks)
        self._refs: BlockArray = np.zeros(num_blocks + 1, np.int32)
        self._findable = np.zeros(num_blocks + 1, np.bool_)
        self.lru = ReleaseQueue(num_blocks, clock)
        self.ref = view(self._refs)
        self._findable_at = view(self._findable)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds and nothing can be found in."""
        return self.free.count

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and whose content can be found."""
        return self.lru.count

    @property
    def num_live(self) -> int:
        """Blocks held by at least one block table."""
        return self.num_blocks - self.free.count - self.lru.count

    @property
    def num_available(self) -> int:
        """Blocks that can be taken: free ones and evictable ones."""
        return self.free.count + self.lru.count

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
        if count > free.count + self.lru.count:
            raise CacheFull(
                f"need {count} blocks, {free.count} free + {self.num_cached} evictable of "
                f"{self.num_blocks}; close sequences or resize the cache",
                needed=count,
                available=self.num_available,
                capacity=self.num_blocks,
            )
        if count == 1:
            block, was_evicted = self.take_one(after)
            return [block], [block] if was_evicted else []
        taken = free.take_behind(after, count) if after and free.count else []
        rest: list[int] = []
        while len(taken) + len(rest) < count and free.count:
            rest += free.take_run(count - len(taken) - len(rest))
        evicted = self._evict(count - len(taken) - len(rest))
        # Blocks of one old sequence come tail first; sorted they are adjacent again.
        taken += sorted(rest + evicted)
        self._refs.put(id_array(taken), 1)
        return taken, evicted

    def take_one(self, after: int = NULL_BLOCK) -> tuple[int, bool]:
        """:meth:`take` one block, which must be available: its id, and whether its content was evicted."""
        free = self.free
        if free.count:
            block = ((free.take_behind(after, 1) if after else []) or free.take_run(1))[0]
            self.ref[block] = 1
            return block, False
        block = self.lru.pop_one()
        self._findable_at[block] = False
        self.ref[block] = 1
        return block, True

    def fill(self, count: int) -> list[int]:
        """Make so many free blocks cached; there must be as many.

        As if taken, marked findable and released, the last one first: the first one is evicted before the others.
        """
        blocks: list[int] = []
        while len(blocks) < count:
            blocks += self.free.take_run(count - len(blocks))
        ids = id_array(blocks)
        self._findable.put(ids, True)
        self.lru.push(ids)
        return blocks

    def retain(self, blocks: Sequence[int] | BlockArray) -> None:
        """Add one reference to each block; null blocks are skipped.

        Raises:
            BlockError: a block is unknown or free; nothing was changed.
        """
        held, before = self._held(blocks, "retained")
        fresh = held[before == 0]
        if len(fresh):
            findable = self._findable.take(fresh)
            if not findable.all():
                block = fresh[np.argmin(findable)]
                raise BlockError(f"block {block} is free: it cannot be retained; take it from the pool first")
            self.lru.remove(fresh)
        self._refs.put(held, before + 1)

    def release(self, blocks: Sequence[int] | BlockArray) -> None:
        """Drop one reference of each block of one sequence, given head first; null blocks are skipped.

        A block nobody holds any more becomes cached if its content can be found, else free. The tail
        enters the LRU order before the head, so that a chain never loses its start first.

        Raises:
            BlockError: a block is unknown, or has fewer references than it is released; nothing was changed.
        """
        held, before = self._held(blocks, "released")
        left = before - 1
        if np.count_nonzero(left < 0):
            raise BlockError(f"block {held[left.argmin()]} was released more often than it was retained")
        self._refs.put(held, left)
        gone = held[left == 0][::-1]
        findable = self._findable.take(gone)
        if np.count_nonzero(findable) < len(gone):
            self.free.put(gone[~findable])
            gone = gone[findable]
        self.lru.push(gone)

    def use(self, blocks: Sequence[int]) -> None:
        """Make cached blocks, each given once, the most recently used: as if retained and released at once."""
        self.lru.renew(id_array(blocks)[::-1])

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
        refs = self._refs.take(blocks)
        if np.count_nonzero(refs) < len(refs):
            self.mark_findable(int(blocks[refs.argmin()]))
        self._findable.put(blocks, True)

    def unmark_findable(self, block: int) -> None:
        """Forget the content; a cached block becomes free."""
        if self._findable_at[block]:
            self._findable_at[block] = False
            if block in self.lru:
                only = id_array([block])
                self.lru.remove(only)
                self.free.put(only)

    def drop_cached(self) -> list[int]:
        """Evict every cached block; returns their ids, which are free now."""
        return self.evict(self.num_cached)

    def evict(self, count: int) -> list[int]:
        """Evict the ``count`` least recently used cached blocks, or all if there are fewer; they are free now."""
        evicted = self._evict(min(count, self.num_cached))
        self.free.put(id_array(evicted))
        return evicted

    def lru_order(self) -> list[int]:
        """The cached blocks, next to be evicted first."""
        order: list[int] = self.lru.order().tolist()
        return order

    # ---- other sizes and places ----------------------------------------------------------------

    def fresh(self, num_blocks: int) -> BlockPool:
        """A new pool of another size, whose memory this one can take over."""
        return BlockPool(num_blocks, self._clock)

    def resize(self, num_blocks: int, fresh: BlockPool | None = None) -> PoolResize:
        """Change the capacity while blocks are in use.

        Shrinking evicts cached blocks, least recently used first, and moves what is left under the new
        limit; the caller renames the moved ids in its tables and moves the bytes.

        Args:
            num_blocks: usable blocks from now on.
            fresh: what :meth:`fresh` gave for that size, if it was asked already.

        Raises:
            CacheFull: more blocks are live than ``num_blocks``; nothing was changed.
            MemoryError: none for so many; nothing was changed.
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
        fresh = fresh or self.fresh(num_blocks)
        surplus = self.num_live + self.num_cached - num_blocks
        evicted = self._evict(max(0, surplus))
        self.free.put(id_array(evicted))
        used = self.used()
        homeless = used[used > num_blocks]
        taken = np.zeros(num_blocks + 1, np.bool_)
        taken[used[used <= num_blocks]] = True
        taken[0] = True
        holes = np.flatnonzero(~taken)[: len(homeless)]
        moves = {BlockId(old): BlockId(new) for old, new in zip(homeless.tolist(), holes.tolist(), strict=True)}
        self.move(moves, fresh)
        return PoolResize([BlockId(block) for block in evicted], moves, int(np.flatnonzero(taken)[-1]))

    def used(self) -> BlockArray:
        """The blocks that are not free, ascending."""
        return np.flatnonzero((self._refs > 0) | self._findable).astype(np.int32)

    def move(self, moves: dict[BlockId, BlockId], fresh: BlockPool | None = None) -> None:
        """Rename used blocks; the targets are free, or moved away too. From now on this is ``fresh``, a pool that is
        new, with what this one holds; by default one of the same size.
        """
        fresh = fresh or self.fresh(self.num_blocks)
        used = self.used()
        renamed = np.array([moves.get(block, block) for block in used.tolist()], np.int32)
        names = np.zeros(self.num_blocks + 1, np.int32)
        names[used] = renamed
        order, times = names[self.lru.order()], self.lru.times()
        fresh._refs[renamed], fresh._findable[renamed] = self._refs[used], self._findable[used]
        fresh.lru.push(order, times)
        fresh.free = FreeRuns(fresh.num_blocks, used=renamed)
        vars(self).update(vars(fresh))

    def check_valid(self) -> None:
        """Assert every invariant of the class docstring; expensive, for tests."""
        refs, findable = self._refs[1:], self._findable[1:]
        free, cached = (refs == 0) & ~findable, (refs == 0) & findable
        assert np.count_nonzero(free) == self.num_free and np.count_nonzero(cached) == self.num_cached
        assert np.count_nonzero(refs) == self.num_live and not np.any(refs < 0)
        assert self.free.blocks() == (np.flatnonzero(free) + 1).tolist()
        assert [block for block in range(1, self.num_blocks + 1) if block in self.lru] == sorted(self.lru_order())
        assert sorted(self.lru_order()) == (np.flatnonzero(cached) + 1).tolist()
        self.free.check_valid()

    # ---- inside --------------------------------------------------------------------------------

    def _evict(self, count: int) -> list[int]:
        """The ``count`` least recently used cached blocks: no longer findable, not yet free."""
        if not count:
            return []
        blocks = self.lru.pop(count)
        self._findable.put(blocks, False)
        evicted: list[int] = blocks.tolist()
        return evicted

    def _held(self, blocks: Sequence[int] | BlockArray, verb: str) -> tuple[BlockArray, BlockArray]:
        """The blocks that are not null, as an array, and the references of each."""
        try:
            ids = id_array(blocks)
            refs = self._refs.take(ids)
        except (OverflowError, IndexError):
            self._check_known(next(block for block in blocks if not 0 <= block <= self.num_blocks))
            raise
        if np.count_nonzero(ids) < len(ids):
            real = ids != 0
            ids, refs = ids[real], refs[real]
        ordered = np.sort(ids)
        twice = ordered[1:] == ordered[:-1]
        if np.count_nonzero(twice):
            raise BlockError(f"block {ordered[twice.argmax()]} was {verb} more often than a table holds it: once")
        return ids, refs

    def _check_known(self, block: int) -> None:
        if not 1 <= block <= self.num_blocks:
            raise BlockError(f"block {block} is unknown: ids are 1 .. {self.num_blocks}")
