"""Reserve, commit and roll back one row of a step; and how a sequence lets go of blocks.

Blocks change hands only here. The caller (:class:`~kvcache_core.cache.BlockCache`) holds the lock.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from collections.abc import Collection as _Collection
from collections.abc import Sequence as _Sequence

from kvcache_core.errors import CacheFull
from kvcache_core.match import LayerGroup, first_visible_block
from kvcache_core.plan import Reservation
from kvcache_core.prefix import PrefixIndex
from kvcache_core.sequence import Sequence
from kvcache_core.types import BlockId, Evicted

__all__ = ["Transactions"]


class Transactions:
    """The moves between sequences, pools and the prefix index."""

    def __init__(self, index: PrefixIndex, groups: _Sequence[LayerGroup]) -> None:
        self.index = index
        self.groups = groups
        self.block_size = index.block_size
        self.evicted_blocks = 0
        self.on_evict: Callable[[list[Evicted]], None] | None = None

    # ---- reserve -------------------------------------------------------------------------------

    def reserve(self, rows: _Sequence[tuple[Sequence, array[int]]]) -> list[Reservation]:
        """Take every block the rows need, or raise :class:`CacheFull` before anything is changed."""
        short = self._shortage(rows)
        if short:
            # A cached tail that only this row holds can be written in place instead of copied.
            stealable = [seq for seq, _ in rows if self._must_copy(seq) and self._held_alone(seq)]
            if short > len(stealable):
                self._raise_full(rows)
            for seq in stealable[:short]:
                self._take_over_tail(seq)
        wanted = self._ahead(rows)
        reserved: list[Reservation] = []
        evicted: list[Evicted] = []
        for (seq, tokens), ahead in zip(rows, wanted, strict=True):
            reserved.append(self._reserve_row(seq, tokens, ahead, evicted))
        self.announce(evicted)
        return reserved

    def evict(self, number: int, blocks: Iterable[int], evicted: list[Evicted]) -> None:
        """The pool has evicted ``blocks`` of group ``number``: forget what they held, note it in ``evicted``."""
        blocks = list(blocks)
        if self.on_evict is not None:
            evicted += self.describe(number, blocks)
        for block in blocks:
            self.index.detach(number, block)
        self.evicted_blocks += len(blocks)

    def describe(self, number: int, blocks: Iterable[int]) -> list[Evicted]:
        """What findable blocks of group ``number`` hold."""
        roots: dict[int, bytes] = {}
        found = []
        for block in blocks:
            node = self.index.node(number, block)
            found.append(
                Evicted(number, BlockId(block), self.index.key(node), self.index.fill(node), self._root(node, roots))
            )
        return found

    def _root(self, node: int, roots: dict[int, bytes]) -> bytes:
        """The key of the root above ``node``; ``roots`` remembers the way, for blocks of one chain."""
        path = []
        while node not in roots:
            parent = self.index.parent(node)
            if not parent:
                roots[node] = self.index.key(node) or b""
                break
            path.append(node)
            node = parent
        root = roots[node]
        roots.update(dict.fromkeys(path, root))
        return root

    def announce(self, evicted: list[Evicted]) -> None:
        """Tell :attr:`on_evict`, before anything can overwrite the blocks' bytes."""
        if evicted and self.on_evict is not None:
            self.on_evict(evicted)

    def fits_unreserved(self, rows: _Sequence[tuple[Sequence, array[int]]], seqs: Iterable[Sequence]) -> bool:
        """Whether the rows would fit if ``seqs`` gave back what they reserved ahead."""
        stealable = sum(self._must_copy(seq) and self._held_alone(seq) for seq, _ in rows)
        others = [seq for seq in seqs if not seq.in_step]
        for number, group in self._groups_of(rows):
            spare = sum(len(seq.tables[number]) - len(seq.nodes) for seq in others if number < len(seq.tables))
            needed = sum(
                -(-(seq.length + len(tokens)) // self.block_size) - len(seq.nodes) + self._must_copy(seq)
                for seq, tokens in rows
            )
            if needed - stealable > group.pool.num_available + spare:
                return False
        return True

    def held(self, seqs: _Collection[Sequence]) -> int:
        """Live blocks, without those reserved ahead, in the group that has most of them."""
        return max(
            group.pool.num_live
            - sum(len(seq.tables[number]) - len(seq.nodes) for seq in seqs if number < len(seq.tables))
            for number, group in enumerate(self.groups)
        )

    def return_reserved(self, seqs: Iterable[Sequence]) -> bool:
        """Give back the blocks that sequences reserved ahead and hold no tokens; whether there were any."""
        returned = False
        for seq in seqs:
            if seq.in_step:
                continue
            seq.max_length = 0
            for number, (group, table) in enumerate(zip(self.groups, seq.tables, strict=False)):
                if len(table) > len(seq.nodes):
                    group.pool.release(table[len(seq.nodes) :])
                    seq.tables[number] = table[: len(seq.nodes)]
                    returned = True
        return returned

    def _groups_of(self, rows: _Sequence[tuple[Sequence, array[int]]]) -> list[tuple[int, LayerGroup]]:
        """The layer groups that the rows use: the same for all of them."""
        return list(enumerate(self.groups[: len(rows[0][0].tables)]))

    def _needed(self, seq: Sequence, count: int, number: int) -> int:
        end_block = -(-(seq.length + count) // self.block_size)
        return max(0, end_block - len(seq.tables[number])) + self._must_copy(seq)

    def _shortage(self, rows: _Sequence[tuple[Sequence, array[int]]]) -> int:
        """Blocks missing in the group that is shortest of them; 0 if there is room."""
        missing = (
            sum(self._needed(seq, len(tokens), number) for seq, tokens in rows) - group.pool.num_available
            for number, group in self._groups_of(rows)
        )
        return max(0, *missing)

    def _raise_full(self, rows: _Sequence[tuple[Sequence, array[int]]]) -> None:
        for number, group in self._groups_of(rows):
            needed = sum(self._needed(seq, len(tokens), number) for seq, tokens in rows)
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

    def _ahead(self, rows: _Sequence[tuple[Sequence, array[int]]]) -> list[int]:
        """Length to reserve for each row: what it asked for ahead, if free blocks allow it for all."""
        wanted = [max(seq.max_length, seq.length + len(tokens)) for seq, tokens in rows]
        for number, group in self._groups_of(rows):
            total = sum(
                self._needed(seq, length - seq.length, number) for (seq, _), length in zip(rows, wanted, strict=True)
            )
            if total > group.pool.num_available:
                return [seq.length + len(tokens) for seq, tokens in rows]
        return wanted

    def _reserve_row(self, seq: Sequence, tokens: array[int], ahead: int, evicted: list[Evicted]) -> Reservation:
        size = self.block_size
        offset, at = seq.length % size, seq.length // size
        copy = self._must_copy(seq)
        if offset and not copy and self.index.fill(seq.nodes[-1]) > offset:
            # Truncated inside an open tail that was shared then: what follows is overwritten now.
            self.index.cut(seq.nodes[-1], offset)
        if offset and not copy:
            self.index.begin_step(seq.nodes[-1])
        lengths = [len(table) for table in seq.tables]
        copied = [table[at] for table in seq.tables] if copy else None
        for number, (group, table) in enumerate(zip(self.groups, seq.tables, strict=False)):
            new = max(0, -(-ahead // size) - len(table))
            before = at - 1 if copy else len(table) - 1
            taken, lost = group.pool.take(new + copy, after=table[before] if before >= 0 else 0)
            self.evict(number, lost, evicted)
            if copy:
                # A new list: plans made before may still read the old one.
                seq.tables[number] = [*table[:at], taken.pop(0), *table[at + 1 :]]
            seq.tables[number].extend(taken)
        seq.in_step = True
        return Reservation(seq, tokens, seq.length, tuple(seq.tables), lengths, copied)

    def _must_copy(self, seq: Sequence) -> bool:
        """Whether the next token falls into a block that others hold or that is already findable."""
        if not seq.length % self.block_size:
            return False
        node, used = seq.nodes[-1], len(seq.tables)
        if any(self.index.block(number, node) for number in range(used, len(self.groups))):
            # Stored outputs belong to the tail, and this sequence stores none: it must not grow under them.
            return True
        if self.index.fill(node) > seq.length % self.block_size and not seq.cut_tail:
            # The rest of the tail is of a closed sequence that this one was matched with: it stays findable.
            return True
        return not (self.index.is_open(node) and self._held_alone(seq))

    def _held_alone(self, seq: Sequence) -> bool:
        at = seq.length // self.block_size
        return all(group.pool.refs(table[at]) == 1 for group, table in zip(self.groups, seq.tables, strict=False))

    def _take_over_tail(self, seq: Sequence) -> None:
        """Turn a findable tail that only ``seq`` holds into its own open tail: it is evicted in place."""
        at = seq.length // self.block_size
        blocks = [table[at] for table in seq.tables]
        old = seq.nodes[-1]
        node = self._start_tail(self.index.parent(old), seq, at)
        self.index.append(node, self.index.tokens(old)[: seq.length % self.block_size])
        evicted: list[Evicted] = []
        for number, (group, block) in enumerate(zip(self.groups, blocks, strict=False)):
            group.pool.unmark_findable(block)
            self.evict(number, [block], evicted)
            self.index.attach(node, number, block)
        self.announce(evicted)
        self._move_tip(seq, old, node)
        seq.nodes[-1] = node

    # ---- commit --------------------------------------------------------------------------------

    def commit(self, row: Reservation) -> None:
        """The row's tokens are in the store: make them part of the sequence and publish full blocks."""
        seq, size = row.seq, self.block_size
        tokens = row.tokens
        old_tip = seq.tip
        self.index.end_step(old_tip)
        if row.copied is not None:
            self._replace_tail(seq, row.copied)
        done = 0
        while done < len(tokens):
            at, offset = divmod(seq.length, size)
            if not offset:
                self._open_block(seq, at)
            count = min(size - offset, len(tokens) - done)
            self.index.append(seq.nodes[at], tokens[done : done + count])
            seq.length += count
            done += count
            if offset + count == size:
                self._publish(seq, at)
        seq.in_step = False
        seq.cut_tail = False
        self.index.pin(seq.tip)
        self.index.unpin(old_tip)
        self.drop_behind_window(seq)

    def stays_in_block(self, seq: Sequence) -> bool:
        """Whether the next token goes into the open tail that the sequence has for itself."""
        offset = seq.length % self.block_size
        return offset > 0 and self.index.fill(seq.nodes[-1]) == offset and not self._must_copy(seq)

    def append(self, seq: Sequence, token: int) -> None:
        """Add a token to an open tail; the caller has asked :meth:`stays_in_block`."""
        old_tip = seq.tip
        self.index.append(old_tip, array("i", (token,)))
        seq.length += 1
        seq.cut_tail = False
        if not seq.length % self.block_size:
            self._publish(seq, len(seq.nodes) - 1)
            self.index.pin(seq.tip)
            self.index.unpin(old_tip)
        self.drop_behind_window(seq)

    def rollback(self, row: Reservation) -> None:
        """Give back what :meth:`reserve` took; nothing of the step can be found."""
        seq = row.seq
        self.index.end_step(seq.tip)
        at = seq.length // self.block_size
        for number, (group, table) in enumerate(zip(self.groups, seq.tables, strict=False)):
            length = row.table_lengths[number]
            group.pool.release(table[length:])
            restored = table[:length]
            if row.copied is not None:
                group.pool.release([table[at]])
                restored[at] = row.copied[number]
            seq.tables[number] = restored
        seq.in_step = False

    def _replace_tail(self, seq: Sequence, copied: list[int]) -> None:
        """The shared tail was copied: go on in the copy and let go of the original."""
        at = seq.length // self.block_size
        old = seq.nodes[-1]
        node = self._start_tail(self.index.parent(old), seq, at)
        self.index.append(node, self.index.tokens(old)[: seq.length % self.block_size])
        for number, table in enumerate(seq.tables):
            self.index.attach(node, number, table[at])
        seq.nodes[-1] = node
        self._settle_tail(old, copied)
        for group, block in zip(self.groups, copied, strict=False):
            group.pool.release([block])

    def _open_block(self, seq: Sequence, at: int) -> None:
        node = self._start_tail(seq.tip, seq, at)
        for number, table in enumerate(seq.tables):
            self.index.attach(node, number, table[at])
        seq.nodes.append(node)

    def _start_tail(self, parent: int, seq: Sequence, at: int) -> int:
        extras = self.index.block_extras(seq.extra_keys, at) if seq.extra_keys else {}
        return self.index.open_tail(parent, extras)

    def _publish(self, seq: Sequence, at: int) -> None:
        """Make a full block findable; if its twin already is, use the twin and give this one back."""
        node = seq.nodes[at]
        known = self.index.complete(node, self._prompt_key(seq, at))
        seq.nodes[at] = known
        for number, (group, table) in enumerate(zip(self.groups, seq.tables, strict=False)):
            mine, twin = table[at], self.index.block(number, known)
            if known != node:
                if twin:
                    group.pool.retain([twin])
                    self.index.detach(number, mine)
                    group.pool.unmark_findable(mine)
                    group.pool.release([mine])
                    seq.tables[number] = [*table[:at], twin, *table[at + 1 :]]
                    continue
                # The twin lost its block in this group (a window let it go): ours fills the hole.
                self.index.detach(number, mine)
                self.index.attach(known, number, mine)
            group.pool.mark_findable(mine)

    def _prompt_key(self, seq: Sequence, at: int) -> bytes | None:
        """The key computed when the prompt was opened, if the block is still the prompt's block."""
        if at >= len(seq.prompt_keys):
            return None
        size = self.block_size
        if seq.prompt[at * size : (at + 1) * size] != self.index.tokens(seq.nodes[at]):
            return None
        before = seq.nodes[at - 1] if at else seq.root
        same_past = not at or self.index.key(before) == seq.prompt_keys[at - 1]
        return seq.prompt_keys[at] if same_past else None

    # ---- letting go ----------------------------------------------------------------------------

    def release_from(self, seq: Sequence, at: int) -> None:
        """Give back the blocks from table index ``at`` on, in every group, tail first."""
        if len(seq.nodes) > at:
            last = len(seq.nodes) - 1
            self._settle_tail(seq.nodes[last], [table[last] for table in seq.tables])
        for number, (group, table) in enumerate(zip(self.groups, seq.tables, strict=False)):
            group.pool.release(table[at:])
            seq.tables[number] = table[:at]
            seq.dropped[number] = min(seq.dropped[number], at)
        del seq.nodes[at:]

    def _settle_tail(self, node: int, blocks: list[int]) -> None:
        """Before the last holder lets go of an open tail: keep it findable, unless that adds nothing."""
        if not self.index.is_open(node):
            return
        alone = [group.pool.refs(block) == 1 for group, block in zip(self.groups, blocks, strict=False)]
        if not all(alone):
            # A sequence without outputs may share the rest of the tail: the outputs stay with it.
            for group, block, last in zip(self.groups, blocks, alone, strict=False):
                if last:
                    group.pool.mark_findable(block)
            return
        if self._is_covered(node):
            for number, block in enumerate(blocks):
                self.groups[number].pool.unmark_findable(block)
                self.index.detach(number, block)
            return
        self.index.close_tail(node)
        for group, block in zip(self.groups, blocks, strict=False):
            group.pool.mark_findable(block)

    def _is_covered(self, node: int) -> bool:
        """Whether another block that can be found starts with all tokens of the tail ``node``."""
        tokens = self.index.tokens(node)
        extras = self.index.extras(node)
        for shared, other in self.index.heads(self.index.parent(node), tokens, extras):
            if shared < len(tokens):
                return False
            if other != node and not self.index.is_open(other):
                return all(
                    self.index.block(number, other) or not self.index.block(number, node)
                    for number in range(len(self.groups))
                )
        return False

    def drop_behind_window(self, seq: Sequence) -> None:
        """Let go of the blocks that no later token can see, in the groups that have a window."""
        for number, (group, table) in enumerate(zip(self.groups, seq.tables, strict=False)):
            if group.window is None:
                continue
            start = seq.dropped[number]
            first = min(first_visible_block(seq.length, group.window, self.block_size), len(seq.nodes))
            if seq.length % self.block_size:
                first = min(first, len(seq.nodes) - 1)
            if first > start:
                group.pool.release(table[start:first])
                seq.tables[number] = [0] * first + table[first:]
                seq.dropped[number] = first

    def regain_window(self, seq: Sequence, length: int) -> bool:
        """Take back dropped blocks that a truncation to ``length`` makes visible again, if all are there."""
        size = self.block_size
        last = -(-length // size)
        regained: list[tuple[int, int, list[int]]] = []
        for number, group in enumerate(self.groups[: len(seq.tables)]):
            first = min(first_visible_block(length, group.window, size), last)
            if length % size:
                first = min(first, last - 1)
            missing = [
                int(self.index.block(number, node)) for node in seq.nodes[first : min(seq.dropped[number], last)]
            ]
            if not all(missing):
                return False
            regained.append((number, first, missing))
        for number, first, missing in regained:
            if missing:
                self.groups[number].pool.retain(missing)
                table = seq.tables[number]
                seq.tables[number] = table[:first] + missing + table[first + len(missing) :]
                seq.dropped[number] = first
        return True

    def _move_tip(self, seq: Sequence, old: int, new: int) -> None:
        if seq.tip == old:
            self.index.pin(new)
            self.index.unpin(old)
