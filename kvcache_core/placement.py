"""Where blocks lie: another capacity, and blocks of a sequence brought next to each other."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Collection as _Collection
from collections.abc import Sequence as _Sequence
from itertools import pairwise

from kvcache_core.errors import CacheFull, StepError
from kvcache_core.reserve import Room
from kvcache_core.sequence import Sequence
from kvcache_core.types import BlockId, Evicted, PoolResize

__all__ = ["CompactHook", "Placement", "count_extents"]

CompactHook = Callable[[list[PoolResize]], None]
"""Called with the moves of a compaction, per layer group, before anything is changed."""

_GAP = 8
"""Free blocks that a compaction leaves behind each sequence, at most."""


class Placement:
    """Moves blocks between steps: whoever holds bytes has to follow the moves that are returned."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self.blocks = room.blocks
        self.groups = room.groups

    def resize(self, num_blocks: int, seqs: _Collection[Sequence]) -> list[PoolResize]:
        """Give every pool another capacity; see :meth:`BlockCache.resize`."""
        _check_idle(seqs, "resize")
        live = max(group.pool.num_live for group in self.groups)
        if num_blocks < live and self.room.held(seqs) <= num_blocks:
            self.room.return_reserved(seqs)
            live = max(group.pool.num_live for group in self.groups)
        if num_blocks < live:
            raise CacheFull(
                f"cannot shrink to {num_blocks} blocks: {live} of {self.groups[0].pool.num_blocks} are held by open "
                "sequences; close some first",
                needed=live,
                available=num_blocks,
                capacity=self.groups[0].pool.num_blocks,
            )
        fresh = [group.pool.fresh(num_blocks) for group in self.groups]  # all of them, or no memory and no change
        results = []
        for number, group in enumerate(self.groups):
            result = group.pool.resize(num_blocks, fresh[number])
            evicted: list[Evicted] = []
            self.blocks.evict(number, list(result.evicted), evicted)
            self.blocks.announce(evicted)
            self._follow(number, result.moves, seqs)
            results.append(result)
        return results

    def compact(self, seqs: _Collection[Sequence], before: CompactHook | None = None) -> list[PoolResize]:
        """Bring the blocks of open sequences together; see :meth:`BlockCache.compact`."""
        _check_idle(seqs, "compact")
        results = []
        for number, group in enumerate(self.groups):
            tables = [seq.tables[number] for seq in seqs if number < len(seq.tables)]
            results.append(PoolResize([], _moves(tables, group.pool.used().tolist(), group.pool.num_blocks)))
        fresh = [group.pool.fresh(group.pool.num_blocks) for group in self.groups]
        if before is not None:
            before(results)
        for number, group in enumerate(self.groups):
            if moves := results[number].moves:
                group.pool.move(moves, fresh[number])
                self._follow(number, moves, seqs)
        return results

    def _follow(self, number: int, moves: dict[BlockId, BlockId], seqs: _Collection[Sequence]) -> None:
        """The pool of group ``number`` has renamed blocks: so do the index and the block tables."""
        self.blocks.index.move_block(number, moves, self.groups[number].pool.num_blocks)
        for seq in seqs:
            if moves and number < len(seq.tables):
                seq.tables[number] = [moves.get(BlockId(block), block) for block in seq.tables[number]]


def count_extents(table: _Sequence[int]) -> int:
    """Runs of adjacent blocks in a block table, null blocks left out.

    Example:
        >>> count_extents([0, 0, 7, 8, 3, 4, 5])
        2
    """
    return sum(1 for before, block in pairwise([0, *table]) if block and (not before or block != before + 1))


def _moves(tables: _Sequence[list[int]], used: list[int], num_blocks: int) -> dict[BlockId, BlockId]:
    """{old: new} that lays the tables' blocks from 1 on, table by table; none if that saves no extent.

    A block that several tables share lies where the first of them has it. Behind each table stay free blocks, if there
    are, so that it grows in place. Other used blocks stay where they are, or take a place that became free.
    """
    gap = min(_GAP, (num_blocks - len(used)) // max(1, len(tables)))
    target: dict[int, int] = {}
    last = 0
    for table in tables:
        own = [block for block in table if block and block not in target]
        target.update(zip(own, range(last + 1, last + 1 + len(own)), strict=True))
        last += len(own) + gap * bool(own)
    after = sum(count_extents([target.get(block, 0) for block in table]) for table in tables)
    if after >= sum(map(count_extents, tables)):
        return {}
    others = [block for block in used if block not in target]
    stays = {block for block in others if block > last}
    places = (block for block in range(last + 1, num_blocks + 1) if block not in stays)
    target.update(zip((block for block in others if block <= last), places, strict=False))
    return {BlockId(old): BlockId(new) for old, new in target.items() if old != new}


def _check_idle(seqs: _Collection[Sequence], verb: str) -> None:
    if any(seq.in_step for seq in seqs):
        raise StepError(f"cannot {verb} during a step: commit it or roll it back first")
