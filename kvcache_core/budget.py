"""One limit in bytes for both kinds of content: K/V blocks and activations."""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from kvcache_core.cache import BlockCache
from kvcache_core.entries import EntryCache
from kvcache_core.errors import InvalidInput, OutOfMemory
from kvcache_core.layout import BlockLayout
from kvcache_core.store import KVStore, allocating
from kvcache_core.types import PoolResize

__all__ = ["Budget", "blocks_in", "compact_blocks", "first_blocks", "resize_blocks"]

_PARTS = 16
"""Memory moves in parts of at least a sixteenth: a move copies what lies in the pool."""


class Budget:
    """Gives the two kinds of one cache their shares of ``memory``, and moves memory from one to the other.

    The arrays of K and V have a size, and what they leave is the limit of the activations. Whichever kind is short of
    room looks at the other before it evicts its own: what the other has free or has not used since the claimant's own
    next victim was used is older content, and goes first. Memory moves in parts, and one more part of such content
    stays behind. So between two moves in opposite directions at least a part was filled, and what is given up is the
    least recently used content of both kinds but for two parts. Where evicting its own would not be enough, a kind
    takes what it needs. Nothing moves while a step or a reader of the arrays is under way: then a kind evicts its own;
    what activations lacked is looked at again before the next step. Nor where there is no memory for new arrays: that
    is tried again after as many uses, or times that memory was wanted, as there are blocks.

    Invariants (:meth:`check_valid` asserts them):
        - the bytes of the arrays and the limit of the activations are ``memory`` together.
        - activations hold no more bytes than their limit.

    Args:
        memory: bytes.
        entries: the activations.
        core: the bookkeeping of K and V, of the same clock as ``entries``.
        store: their arrays.
    """

    def __init__(self, memory: int, entries: EntryCache, core: BlockCache, store: KVStore) -> None:
        self.memory = memory
        self.moves = self.failed_moves = 0
        self._not_before = 0
        self._owed = 0
        self._entries = entries
        self._core = core
        self._store = store
        self._layout = store.layout
        entries.limit = weakref.ref(self)
        core.share(weakref.ref(self))

    @property
    def more_blocks(self) -> int:
        """Blocks that the activations could give up at most."""
        return int(self._entries.memory or 0) // self._layout.bytes_per_block

    # ---- one kind is short of room -------------------------------------------------------------

    def blocks_short(self, least: Sequence[int], wanted: Sequence[int]) -> None:
        """A step takes ``least`` blocks of each layer group, better ``wanted``."""
        pools = [group.pool for group in self._core.groups[: len(wanted)]]
        beyond = max(count - pool.num_available for count, pool in zip(least, pools, strict=True))
        takes = [(count - pool.num_free, pool.lru) for count, pool in zip(wanted, pools, strict=True)]
        short = max(count for count, _ in takes)
        if short <= 0 or not self._can_move(growing=True):
            return

        def enough(time: int) -> bool:
            """Whether giving up what was used before ``time`` makes the room."""
            return min(len(lru.before(time)) - count for count, lru in takes) + given(time) >= 0

        def given(time: int) -> int:
            """Blocks that the activations would give for it."""
            return self._whole_parts(self._entries_before(time))

        victims = [lru.time_of(count) for count, lru in takes if count > 0]
        before = max(self._now if victim is None else victim for victim in victims)
        if given(before):
            before = bisect_left(range(before), True, key=enough)
        self._move(self._parts(short, beyond, given(before), self.more_blocks))

    def could_hold(self, size: int, rest: int) -> bool:
        """Whether an entry of ``size`` bytes can have room now; ``rest`` bytes come behind it."""
        most = int(self._entries.memory or 0)
        if self._can_move(growing=False):
            most += self._less_blocks * self._layout.bytes_per_block
        else:
            self._owed = max(self._owed, size + rest)
        return size <= most

    def settle(self) -> None:
        """Entries found no room while the arrays were in use: see whether they should have more now."""
        if self._owed and self._can_move(growing=False):
            owed, self._owed = self._owed, 0
            self.bytes_short(0, owed)

    def bytes_short(self, size: int, rest: int) -> None:
        """An entry of ``size`` bytes does not fit unless the oldest one goes; others, of ``rest`` bytes, follow."""
        entries, room = self._entries, int(self._entries.memory or 0)
        if not self._can_move(growing=False):
            return
        before = self._now if entries.oldest is None else entries.oldest
        short, beyond = entries.bytes + size + rest - room, size - room if not entries.bytes else 0
        given = self._whole_parts(self._blocks_before(before))
        self._move(-self._parts(self._blocks_for(short), self._blocks_for(beyond), given, self._less_blocks))

    def _whole_parts(self, spare: int) -> int:
        """How many of ``spare`` blocks, free or older, a kind gives: whole parts, and one more stays behind."""
        return max(0, (spare - self._part) // self._part * self._part)

    def _parts(self, short: int, beyond: int, given: int, most: int) -> int:
        """How many blocks move.

        Args:
            short: blocks that are lacking.
            beyond: of those, the ones that evicting its own would not give.
            given: blocks that the other kind gives because they are free or older.
            most: blocks that it could give.
        """
        part = self._part
        found = min(max(0, -(-short // part)) * part, given)
        if found < beyond:
            found = min(-(-beyond // part) * part, most) if beyond <= most else 0
        return found

    def _can_move(self, *, growing: bool) -> bool:
        """Whether the arrays may become larger, or smaller, now."""
        if self._now < self._not_before:
            self._not_before -= 1  # the clock stands still while nothing is kept: being asked counts too
            return False
        return self._core.is_still(growing=growing)

    def _move(self, blocks: int) -> None:
        """Give K and V so many more blocks, or fewer; where there is no memory for the new arrays, none."""
        if not blocks:
            return
        try:
            self._set_blocks(self._core.num_blocks + blocks)
            self.moves += 1
        except OutOfMemory:
            self.failed_moves += 1
            self._not_before = self._now + self._core.num_blocks  # each try may cost as much as the first

    # ---- another limit -------------------------------------------------------------------------

    def resize(self, memory: int) -> None:
        """Change the limit. What has to go is the least recently used of both kinds; K/V gets what activations leave.

        Raises:
            InvalidInput: no block fits.
            CacheFull: open sequences hold more than that; nothing was changed.
            OutOfMemory: no memory for the new arrays beside the present ones; nothing was changed.
        """
        blocks_in(memory, self._layout)
        core, entries = self._core, self._entries
        with core.lock:

            def fits(time: int) -> bool:
                """Whether what was used since ``time`` fits."""
                left = entries.bytes - entries.bytes_before(time)
                return left + self._bytes_of(core.num_blocks - self._blocks_before(time)) <= memory

            time = bisect_left(range(self._now + 1), True, key=fits)
            left = entries.bytes - entries.bytes_before(time)
            old, self.memory = self.memory, memory
            try:
                self._set_blocks((memory - left) // self._layout.bytes_per_block - 1)
            except BaseException:
                self.memory = old
                raise

    def check_valid(self) -> None:
        """Assert every invariant of the class docstring."""
        with self._core.lock:
            assert self._core.num_blocks == self._store.num_blocks
            assert self._entries.memory is not None
            assert self._bytes_of(self._core.num_blocks) + self._entries.memory == self.memory
            assert self._entries.bytes <= self._entries.memory

    # ---- inside --------------------------------------------------------------------------------

    @property
    def _now(self) -> int:
        """A time behind every use."""
        return self._entries.clock.now + 1

    @property
    def _part(self) -> int:
        return _part_of(self.memory // self._layout.bytes_per_block - 1)

    @property
    def _less_blocks(self) -> int:
        """Blocks that K and V could give up at most; one always stays."""
        return min(self._core.num_blocks - 1, *(group.pool.num_available for group in self._core.groups))

    def _blocks_before(self, time: int) -> int:
        """Those of them that are free or were used last before ``time``, in each layer group."""
        spare = (group.pool.num_free + len(group.pool.lru.before(time)) for group in self._core.groups)
        return min(self._core.num_blocks - 1, *spare)

    def _entries_before(self, time: int) -> int:
        """Blocks that fit where no entry is, or one that was used last before ``time``."""
        spare = int(self._entries.memory or 0) - self._entries.bytes + self._entries.bytes_before(time)
        return spare // self._layout.bytes_per_block

    def _blocks_for(self, size: int) -> int:
        return -(-size // self._layout.bytes_per_block)

    def _bytes_of(self, num_blocks: int) -> int:
        """Bytes of the arrays, the null block included."""
        return (num_blocks + 1) * self._layout.bytes_per_block

    def _set_blocks(self, num_blocks: int) -> None:
        """Another split."""
        room = self.memory - self._bytes_of(num_blocks)
        resize_blocks(self._core, self._store, num_blocks, lambda: self._entries.resize(memory=room))


def blocks_in(memory: int, layout: BlockLayout) -> int:
    """Blocks that ``memory`` bytes hold beside the null block.

    Raises:
        InvalidInput: none.
    """
    blocks = memory // layout.bytes_per_block - 1
    if blocks < 1:
        raise InvalidInput(
            f"memory={memory} bytes holds no block: two blocks of {layout.block_size} tokens need "
            f"{2 * layout.bytes_per_block} bytes"
        )
    return blocks


def first_blocks(memory: int, entries: EntryCache, layout: BlockLayout) -> int:
    """Blocks that K and V begin with: what activations do not hold, at least a part. Activations keep to the rest.

    Raises:
        InvalidInput: no block fits.
    """
    most = blocks_in(memory, layout)
    blocks = max((memory - entries.bytes) // layout.bytes_per_block - 1, _part_of(most))
    entries.resize(memory=memory - (blocks + 1) * layout.bytes_per_block)
    return blocks


def resize_blocks(core: BlockCache, store: KVStore, num_blocks: int, entries: Callable[[], None]) -> None:
    """Another capacity for the pools, for ``entries``, which gives the activations theirs, and for the arrays.

    Whatever can say no is asked first: memory for all the new arrays, then the pools.

    Raises:
        CacheFull: more blocks are live; nothing was changed.
        OutOfMemory: the new arrays do not fit beside the old ones; nothing was changed.
        StepError: a step is under way.
    """
    with core.lock:
        arrays = store.allocate(num_blocks)
        results = core.resize(num_blocks)
        entries()
        moves, last = [found.moves for found in results], max(found.last for found in results)
        store.resize(num_blocks, moves, last=last, arrays=arrays)


def compact_blocks(core: BlockCache, store: KVStore) -> int:
    """:meth:`BlockCache.compact`, and the arrays follow; returns how many blocks moved.

    All that moves is read before the tables change, and written in pieces: to write, stores need memory too.

    Raises:
        OutOfMemory: what moves does not fit beside the arrays; nothing was changed.
        StepError: a step is under way.
    """
    contents: list[NDArray[np.uint8]] = []

    def read(results: list[PoolResize]) -> None:
        with allocating(store, sum(len(found.moves) for found in results)):
            for group, found in enumerate(results):
                contents.append(store.export_blocks(group, list(found.moves)))

    with core.lock:
        results = core.compact(read)
        for group, found in enumerate(results):
            targets, content = list(found.moves.values()), contents[group]
            for at in range(0, len(targets), 64):
                store.import_blocks(group, targets[at : at + 64], content[at : at + 64])
    return sum(len(found.moves) for found in results)


def _part_of(blocks: int) -> int:
    return max(1, blocks // _PARTS)
