"""Block ids: who is free, cached or live, and which cached block goes next."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvcache_core.errors import BlockError, CacheFull, InvalidInput
from kvcache_core.types import NULL_BLOCK, BlockId

__all__ = ["BlockPool", "PoolResize", "check_size"]


@dataclass(frozen=True, slots=True)
class PoolResize:
    """What a resize did: evicted blocks (old ids) and the moves old id -> new id."""

    evicted: list[BlockId]
    moves: dict[BlockId, BlockId]


class BlockPool:
    """Reference counts and LRU order over the block ids 1 .. num_blocks. Knows no tokens and no tensors.

    A block is *free* (nobody holds it, nothing to find in it), *cached* (nobody holds it, its content can
    be found) or *live* (held by one or more block tables).

    The LRU order is a queue of releases in which a block may stand several times; only its last entry
    counts, so taking a cached block back out of the order costs nothing and every operation is constant
    time per block, amortised.

    Invariants:
        - free + cached + live == num_blocks.
        - a free block has no references and no findable content.
        - a cached block has no references, findable content and a last entry in the release queue.
        - every free block stands in the free queue.

    Args:
        num_blocks: usable blocks; id 0, the null block, comes on top.
    """

    def __init__(self, num_blocks: int) -> None:
        check_size(num_blocks)
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self.num_cached = 0
        self._refs = array("i", bytes(4 * (num_blocks + 1)))
        self._entries = array("i", bytes(4 * (num_blocks + 1)))
        self._findable = bytearray(num_blocks + 1)
        self._is_free = bytearray(b"\0" + b"\1" * num_blocks)
        self._in_free_queue = bytearray(b"\0" + b"\1" * num_blocks)
        self._free_queue: deque[int] = deque(range(1, num_blocks + 1))
        self._releases: deque[int] = deque()

    @property
    def num_live(self) -> int:
        """Blocks held by at least one block table."""
        return self.num_blocks - self.num_free - self.num_cached

    @property
    def num_available(self) -> int:
        """Blocks that can be taken: free ones and evictable ones."""
        return self.num_free + self.num_cached

    def refs(self, block: int) -> int:
        """How many block tables hold ``block``."""
        self._check_known(block)
        return self._refs[block]

    def take(self, count: int, after: int = NULL_BLOCK) -> tuple[list[BlockId], list[BlockId]]:
        """Take ``count`` blocks for one sequence, each with one reference.

        The block right behind ``after`` comes first if it is free, then runs of free blocks, then the
        least recently used cached blocks; so a sequence's slots are adjacent where that is possible.

        Returns:
            The taken ids in the order to use them, and those of them whose content was evicted.

        Raises:
            CacheFull: fewer than ``count`` blocks are free or cached; nothing was changed.
        """
        if count > self.num_available:
            raise CacheFull(
                f"need {count} blocks, {self.num_free} free + {self.num_cached} evictable of "
                f"{self.num_blocks}; close sequences or resize the cache",
                needed=count,
                available=self.num_available,
                capacity=self.num_blocks,
            )
        taken = self._take_run(after + 1, count) if after else []
        rest: list[BlockId] = []
        while len(taken) + len(rest) < count and self.num_free:
            rest += self._take_run(self._pop_free(), count - len(taken) - len(rest))
        evicted = [self._pop_least_recent() for _ in range(count - len(taken) - len(rest))]
        # Blocks of one old sequence come tail first; sorted they are adjacent again.
        taken += sorted(rest + evicted)
        for block in taken:
            self._refs[block] = 1
        return taken, evicted

    def retain(self, blocks: Iterable[int]) -> None:
        """Add one reference to each block; null blocks are skipped.

        Raises:
            BlockError: a block is unknown or free.
        """
        refs, findable = self._refs, self._findable
        checked = [block for block in blocks if block]
        for block in checked:
            self._check_known(block)
            if not refs[block] and not findable[block]:
                raise BlockError(f"block {block} is free: it cannot be retained; take it from the pool first")
        for block in checked:
            if not refs[block]:
                self.num_cached -= 1
            refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference of each block of one sequence, given head first; null blocks are skipped.

        A block nobody holds any more becomes cached if its content can be found, else free. The tail
        enters the LRU order before the head, so that a chain never loses its start first.

        Raises:
            BlockError: a block is unknown, or has fewer references than it is released; nothing was changed.
        """
        refs, findable = self._refs, self._findable
        for block in blocks:
            if block:
                self._check_known(block)
        for position, block in enumerate(blocks):
            if block:
                if refs[block] < 1:
                    self._restore(blocks[:position])
                    raise BlockError(f"block {block} was released more often than it was retained")
                refs[block] -= 1
        for block in reversed(blocks):
            if block and not refs[block]:
                if findable[block]:
                    self.num_cached += 1
                    self._entries[block] += 1
                    self._releases.append(block)
                else:
                    self._put_free(block)
        if len(self._releases) > 2 * self.num_blocks + 64:
            self._compact_releases()

    def mark_findable(self, block: int) -> None:
        """Keep the content of a live block when its last reference goes."""
        if self.refs(block) < 1:
            raise BlockError(f"block {block} is not live: only a held block can become findable")
        self._findable[block] = 1

    def unmark_findable(self, block: int) -> None:
        """Forget the content; a cached block becomes free."""
        if self._findable[block]:
            self._findable[block] = 0
            if not self._refs[block]:
                self.num_cached -= 1
                self._put_free(block)

    def is_findable(self, block: int) -> bool:
        """Whether the block's content can be found by a prefix match."""
        return bool(self._findable[block])

    def drop_cached(self) -> list[BlockId]:
        """Evict every cached block; returns their ids, which are free now."""
        dropped = [self._pop_least_recent() for _ in range(self.num_cached)]
        for block in dropped:
            self._put_free(block)
        return dropped

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
        evicted = [self._pop_least_recent() for _ in range(surplus)] if surplus > 0 else []
        for block in evicted:
            self._put_free(block)
        self._compact_releases()
        used = [block for block in range(1, self.num_blocks + 1) if not self._is_free[block]]
        homeless = [block for block in used if block > num_blocks]
        holes = (block for block in range(1, num_blocks + 1) if block > self.num_blocks or self._is_free[block])
        moves = {BlockId(old): BlockId(new) for old, new in zip(homeless, holes, strict=False)}
        self._rebuild(num_blocks, used, moves)
        return PoolResize(evicted, moves)

    def check_valid(self) -> None:
        """Assert every invariant of the class docstring; expensive, for tests."""
        free = sum(self._is_free)
        cached = sum(1 for block in range(1, self.num_blocks + 1) if self._findable[block] and not self._refs[block])
        live = sum(1 for block in range(1, self.num_blocks + 1) if self._refs[block])
        assert (free, cached, live) == (self.num_free, self.num_cached, self.num_live)
        assert all(
            not self._refs[block] and not self._findable[block]
            for block in range(1, self.num_blocks + 1)
            if self._is_free[block]
        )
        queued = set(self._releases)
        for block in range(1, self.num_blocks + 1):
            if self._findable[block] and not self._refs[block]:
                assert self._entries[block] > 0 and block in queued
        assert all(block in self._free_queue for block in range(1, self.num_blocks + 1) if self._is_free[block])

    def _take_run(self, start: int, limit: int) -> list[BlockId]:
        """Adjacent free blocks from ``start`` on, at most ``limit``."""
        block = start
        end = min(start + limit, self.num_blocks + 1)
        while block < end and self._is_free[block]:
            self._is_free[block] = 0
            block += 1
        self.num_free -= block - start
        return [BlockId(taken) for taken in range(start, block)]

    def _pop_free(self) -> int:
        """The next free block of the free queue, still free; entries taken as neighbours are skipped."""
        while True:
            block = self._free_queue.popleft()
            self._in_free_queue[block] = 0
            if self._is_free[block]:
                # _take_run takes it next, at once.
                return block

    def _put_free(self, block: int) -> None:
        self._is_free[block] = 1
        self.num_free += 1
        if not self._in_free_queue[block]:
            self._in_free_queue[block] = 1
            self._free_queue.append(block)

    def _pop_least_recent(self) -> BlockId:
        """Evict the least recently used cached block: no longer findable, not yet free."""
        while True:
            block = self._releases.popleft()
            self._entries[block] -= 1
            if not self._entries[block] and not self._refs[block] and self._findable[block]:
                self._findable[block] = 0
                self.num_cached -= 1
                return BlockId(block)

    def _compact_releases(self) -> None:
        """Drop the entries that no longer count."""
        kept: deque[int] = deque()
        for block in self._releases:
            self._entries[block] -= 1
            if not self._entries[block] and not self._refs[block] and self._findable[block]:
                kept.append(block)
        for block in kept:
            self._entries[block] = 1
        self._releases = kept

    def _rebuild(self, num_blocks: int, used: list[int], moves: dict[BlockId, BlockId]) -> None:
        refs = array("i", bytes(4 * (num_blocks + 1)))
        findable = bytearray(num_blocks + 1)
        is_free = bytearray(b"\0" + b"\1" * num_blocks)
        for block in used:
            new = moves.get(BlockId(block), block)
            refs[new], findable[new], is_free[new] = self._refs[block], self._findable[block], 0
        self._releases = deque(moves.get(BlockId(block), block) for block in self._releases)
        self._entries = array("i", bytes(4 * (num_blocks + 1)))
        for block in self._releases:
            self._entries[block] = 1
        self._refs, self._findable, self._is_free = refs, findable, is_free
        self._free_queue = deque(block for block in range(1, num_blocks + 1) if is_free[block])
        self._in_free_queue = bytearray(is_free)
        self.num_blocks = num_blocks
        self.num_free = len(self._free_queue)

    def _restore(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            if block:
                self._refs[block] += 1

    def _check_known(self, block: int) -> None:
        if not 0 < block <= self.num_blocks:
            raise BlockError(f"block {block} is unknown: ids are 1 .. {self.num_blocks}")


def check_size(num_blocks: int) -> None:
    """Raise InvalidInput unless ``num_blocks`` can be the size of a pool."""
    if isinstance(num_blocks, bool) or not isinstance(num_blocks, int) or num_blocks < 1:
        raise InvalidInput(f"a pool needs a whole number of blocks, at least 1; got {num_blocks!r}")
