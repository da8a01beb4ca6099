"""Room for a step: take every block it needs before anything is written, or say what is missing."""

from __future__ import annotations

from array import array
from collections.abc import Collection as _Collection
from collections.abc import Iterable
from collections.abc import Sequence as _Sequence

from kvcache_core.errors import CacheFull
from kvcache_core.match import LayerGroup
from kvcache_core.plan import Reservation
from kvcache_core.sequence import Sequence
from kvcache_core.sharing import LimitOf, no_limit
from kvcache_core.tails import Tails
from kvcache_core.types import Evicted

__all__ = ["Room"]

_Row = tuple[Sequence, "array[int]"]


class Room:
    """Reserves the blocks of a step and gives back what was reserved."""

    def __init__(self, tails: Tails) -> None:
        self.tails = tails
        self.blocks = tails.blocks
        self.groups = tails.groups
        self.index = tails.index
        self.block_size = tails.block_size
        self._has_states = any(group.kind == "state" for group in self.groups)
        self.limit: LimitOf = no_limit

    def reserve(self, rows: _Sequence[_Row]) -> list[Reservation]:
        """Take every block the rows need, or raise :class:`CacheFull` before anything is changed."""
        stays = [self._stays(seq, len(tokens)) for seq, tokens in rows]
        others = [row for row, stay in zip(rows, stays, strict=True) if not stay]
        if others:
            self._ask_for_more(others)
            self._make_room(others)
        ahead = iter(self._ahead(others)) if others else iter(())
        evicted: list[Evicted] = []
        reserved = [
            self._stay(seq, tokens) if stay else self._reserve_row(seq, tokens, next(ahead), evicted)
            for (seq, tokens), stay in zip(rows, stays, strict=True)
        ]
        self.blocks.announce(evicted)
        return reserved

    def rollback(self, row: Reservation) -> None:
        """Give back what :meth:`reserve` took; nothing of the step can be found."""
        seq = row.seq
        seq.in_step = False
        seq.room = row.room
        self.index.end_step(seq.tip)
        if row.table_lengths is None:
            return
        at = seq.length // self.block_size
        for number, (group, table) in enumerate(zip(self.groups, seq.tables, strict=False)):
            length = row.table_lengths[number]
            replaced = row.copied[number : number + 1] if row.copied is not None and row.copied[number] else []
            held = [*table[:at], *replaced, *table[at:]]
            group.pool.release(held[length:])
            seq.tables[number] = held[:length]

    def fits_unreserved(self, rows: _Sequence[_Row], seqs: Iterable[Sequence]) -> bool:
        """Whether the rows would fit if ``seqs`` gave back what they reserved ahead."""
        others = [seq for seq in seqs if not seq.in_step]
        for number, group in self._groups_of(rows):
            spare = sum(len(seq.tables[number]) - len(seq.nodes) for seq in others if number < len(seq.tables))
            needed = sum(
                -(-(seq.length + len(tokens)) // self.block_size) - len(seq.nodes) + self._replaces(seq, group)
                for seq, tokens in rows
            )
            if needed - self._stealable(rows, group) > group.pool.num_available + spare:
                return False
        return True

    def held(self, seqs: _Collection[Sequence]) -> int:
        """Live blocks, without those reserved ahead, in the group that has most of them."""
        return max(
            group.pool.num_live
            - sum(len(seq.tables[number]) - len(seq.nodes) for seq in seqs if number < len(seq.tables))
            for number, group in enumerate(self.groups)
        )

    def return_reserved(self, seqs: Iterable[Sequence]) -> None:
        """Give back the blocks that sequences reserved ahead and hold no tokens."""
        for seq in seqs:
            if seq.in_step:
                continue
            seq.max_length = 0
            for number, (group, table) in enumerate(zip(self.groups, seq.tables, strict=False)):
                if len(table) > len(seq.nodes):
                    group.pool.release(table[len(seq.nodes) :])
                    seq.tables[number] = table[: len(seq.nodes)]

    # ---- one row -------------------------------------------------------------------------------

    def _stays(self, seq: Sequence, count: int) -> bool:
        """Whether ``count`` more tokens go into the last block, without a copy and without a new state."""
        if self._has_states:
            return False
        return seq.room >= count or (
            seq.length % self.block_size + count <= self.block_size and self.tails.is_private(seq)
        )

    def _stay(self, seq: Sequence, tokens: array[int]) -> Reservation:
        self.index.begin_step(seq.nodes[-1])
        room, seq.room = seq.room, 0
        seq.in_step = True
        return Reservation(seq, tokens, seq.length, tuple(seq.tables), None, None, room)

    def _reserve_row(self, seq: Sequence, tokens: array[int], ahead: int, evicted: list[Evicted]) -> Reservation:
        at, offset = divmod(seq.length, self.block_size)
        copy = self.tails.must_copy(seq)
        if offset and not copy:
            # Truncated inside an open tail that was shared then: what follows is overwritten now.
            self.index.cut(seq.nodes[at], offset)
            self.index.begin_step(seq.nodes[at])
        lengths = [len(table) for table in seq.tables]
        copied = [0] * len(seq.tables)
        for number, (group, before) in enumerate(zip(self.groups, seq.tables, strict=False)):
            table, new = before, max(0, -(-ahead // self.block_size) - len(before))
            if copy or (offset > 0 and group.kind == "state"):
                # What was reserved ahead moves up, so that the row's own blocks stay together. A new list: plans made
                # before may still read the old one.
                table, copied[number] = [*before[:at], *before[at + 1 :]], before[at]
                seq.tables[number] = table
                new += 1
            table.extend(self.blocks.take(number, new, table[-1] if table else 0, evicted))
        seq.in_step = True
        seq.room = 0
        tables = tuple(seq.tables)
        return Reservation(seq, tokens, seq.length, tables, lengths, copied if any(copied) else None, own_tail=not copy)

    def _replaces(self, seq: Sequence, group: LayerGroup) -> bool:
        """Whether the step needs another last block: a copy, or a place for the new state beside the old one."""
        if group.kind == "state":
            return bool(seq.length % self.block_size)
        return self.tails.must_copy(seq)

    def _can_take_over(self, seq: Sequence) -> bool:
        """Whether a cached tail, that only this row holds, can be written in place instead of copied."""
        return self.tails.must_copy(seq) and self.tails.held_alone(seq)

    # ---- all rows ------------------------------------------------------------------------------

    def _groups_of(self, rows: _Sequence[_Row]) -> list[tuple[int, LayerGroup]]:
        """The layer groups that the rows use: the same for all of them."""
        return list(enumerate(self.groups[: len(rows[0][0].tables)]))

    def _stealable(self, rows: _Sequence[_Row], group: LayerGroup) -> int:
        """How many rows need a block of the group less if they take over their tails."""
        return 0 if group.kind == "state" else sum(self._can_take_over(seq) for seq, _ in rows)

    def _needed(self, seq: Sequence, length: int, number: int) -> int:
        """Blocks to take until the sequence has ``length`` tokens."""
        new = max(0, -(-length // self.block_size) - len(seq.tables[number]))
        return new + self._replaces(seq, self.groups[number])

    def _ask_for_more(self, rows: _Sequence[_Row]) -> None:
        """Where another kind of content shares the limit and has room, say what the rows need."""
        limit = self.limit()
        if limit is None or not limit.more_blocks:
            return
        least, wanted = [], []
        for number, _ in self._groups_of(rows):
            ends = [(seq, seq.length + len(tokens)) for seq, tokens in rows]
            least.append(sum(self._needed(seq, end, number) for seq, end in ends))
            wanted.append(sum(self._needed(seq, max(end, seq.max_length), number) for seq, end in ends))
        limit.blocks_short(least, wanted)

    def _make_room(self, rows: _Sequence[_Row]) -> None:
        """Raise :class:`CacheFull` if the rows need more than there is; take over tails if that helps."""
        short = 0
        for number, group in self._groups_of(rows):
            needed = sum(self._needed(seq, seq.length + len(tokens), number) for seq, tokens in rows)
            missing = needed - group.pool.num_available
            if missing > 0 and group.kind == "state":
                self._raise_full(rows)
            short = max(short, missing)
        if not short:
            return
        stealable = [seq for seq, _ in rows if self._can_take_over(seq)]
        if short > len(stealable):
            self._raise_full(rows)
        for seq in stealable[:short]:
            self.tails.take_over(seq)

    def _raise_full(self, rows: _Sequence[_Row]) -> None:
        for number, group in self._groups_of(rows):
            needed = sum(self._needed(seq, seq.length + len(tokens), number) for seq, tokens in rows)
            pool = group.pool
            if needed > pool.num_available:
                raise CacheFull(
                    f"the step needs {needed} more blocks of {self.block_size} tokens; there are {pool.num_free} "
                    f"free + {pool.num_cached} evictable of {pool.num_blocks} ({pool.num_live} are held by open "
                    "sequences); close sequences, step fewer rows or resize the cache",
                    needed=needed,
                    available=pool.num_available,
                    capacity=pool.num_blocks,
                )

    def _ahead(self, rows: _Sequence[_Row]) -> list[int]:
        """Length to reserve for each row: what it asked for ahead, if there is room for all."""
        least = [seq.length + len(tokens) for seq, tokens in rows]
        wanted = [max(seq.max_length, length) for (seq, _), length in zip(rows, least, strict=True)]
        if wanted == least:
            return least
        for number, group in self._groups_of(rows):
            total = sum(self._needed(seq, length, number) for (seq, _), length in zip(rows, wanted, strict=True))
            if total > group.pool.num_available:
                return least
        return wanted
