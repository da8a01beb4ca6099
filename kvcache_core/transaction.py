"""Commit a step, and let go of blocks: where tokens become part of their sequences and of the index."""

from __future__ import annotations

import numpy as np

from kvcache_core.keys import block_extras
from kvcache_core.match import first_visible_block
from kvcache_core.plan import Reservation
from kvcache_core.sequence import Sequence
from kvcache_core.tails import Tails
from kvcache_core.types import Evicted, TokenArray

__all__ = ["NEEDS_BLOCK", "Transactions"]

NEEDS_BLOCK = -1
"""What :meth:`Transactions.appendable` says of a row at a block's end."""


class Transactions:
    """The moves between sequences, pools and the prefix index that come after the bytes are written."""

    def __init__(self, tails: Tails) -> None:
        self.tails = tails
        self.blocks = tails.blocks
        self.groups = tails.groups
        self.index = tails.index
        self.block_size = tails.block_size
        self._has_windows = any(group.window is not None for group in self.groups)

    # ---- whole steps ---------------------------------------------------------------------------

    def commit(self, row: Reservation) -> None:
        """The row's tokens are in the store: make them part of the sequence and publish full blocks."""
        seq, tokens, size = row.seq, row.tokens, self.block_size
        old_tip = seq.tip
        self.index.end_step(old_tip)
        if row.room > len(tokens):
            self.index.append(old_tip, tokens)
            seq.length += len(tokens)
            seq.room = row.room - len(tokens)
            seq.in_step = False
            return
        if row.copied is not None:
            self.tails.replace(seq, row.copied)
        count, done = len(tokens), 0
        at, offset = divmod(seq.length, size)
        if offset:
            done = min(size - offset, count)
            self.index.append(seq.nodes[at], tokens[:done])
            seq.length += done
            if offset + done == size:
                self.tails.publish(seq, at)
        if count - done >= size:
            full = (count - done) // size
            values = np.frombuffer(tokens, np.int32)[done : done + full * size]
            self._commit_blocks(seq, values.reshape(full, size))
            done += full * size
        if done < count:
            self.index.append(self.tails.open_block(seq), tokens[done:])
            seq.length += count - done
        seq.in_step = seq.cut_tail = False
        self.move_tip(old_tip, seq.tip)
        self._make_room(seq)

    def _make_room(self, seq: Sequence) -> None:
        """See how many tokens can follow without a look, and drop what windows have passed."""
        seq.room = 0
        if self._has_windows:
            self.drop_behind_window(seq)
        elif self.tails.is_private(seq):
            self.index.claim(seq.nodes[-1], seq)
            seq.room = self.block_size - seq.length % self.block_size

    def _commit_blocks(self, seq: Sequence, tokens: TokenArray) -> None:
        """Append full blocks [blocks, block_size] to a sequence that ends at a block's end, and publish them."""
        index, at, done = self.index, len(seq.nodes), 0
        parent = seq.tip
        while done < len(tokens):
            extras = block_extras(seq.extra_keys, at + done, self.block_size) if seq.extra_keys else {}
            twin = index.child(parent, tokens[done].tobytes(), extras)
            if not twin:
                break
            self.tails.use_twin(seq, at + done, twin)
            seq.nodes.append(twin)
            parent = twin
            done += 1
        if done < len(tokens):
            # Behind a block that is new everything is new: no twins from here on.
            start, end = at + done, at + len(tokens)
            blocks = [np.array(table[start:end], np.int32) for table in seq.tables]
            nodes = index.add_chain(parent, tokens[done:], blocks)
            if seq.extra_keys:
                for number, node in enumerate(nodes, start):
                    index.set_extras(node, block_extras(seq.extra_keys, number, self.block_size))
            for group, held in zip(self.groups, blocks, strict=False):
                group.pool.mark_all_findable(held)
            seq.nodes += nodes
            for number, held in enumerate(blocks):
                self.blocks.published(number, held.tolist())
        seq.length += tokens.size

    # ---- one token -----------------------------------------------------------------------------

    def append_in_room(self, seq: Sequence, token: int) -> None:
        """Add a token to a sequence that has room."""
        tip = seq.nodes[-1]
        self.index.append_one(tip, token)
        seq.length += 1
        seq.room -= 1
        if not seq.room:
            self.tails.publish(seq, len(seq.nodes) - 1)
            self.move_tip(tip, seq.nodes[-1])

    def appendable(self, seq: Sequence) -> int:
        """Whether :meth:`append` can add a token: 0 no, it takes a step; NEEDS_BLOCK if there is one; 1 yes."""
        if seq.length % self.block_size:
            return int(self.tails.is_private(seq))
        at = len(seq.nodes)
        if all(len(table) > at for table in seq.tables):
            return 1
        return 0 if seq.max_length > seq.length else NEEDS_BLOCK

    def append(self, seq: Sequence, token: int) -> None:
        """Add a token; the caller has asked :meth:`appendable`."""
        size, nodes = self.block_size, seq.nodes
        old_tip = seq.tip
        at, offset = divmod(seq.length, size)
        if offset:
            self.index.append_one(old_tip, token)
        else:
            self.extend(seq)
            self.index.append_one(self.tails.open_block(seq), token)
        seq.length += 1
        seq.cut_tail = False
        if offset + 1 == size:
            self.tails.publish(seq, at)
        if nodes[at] != old_tip:
            self.move_tip(old_tip, nodes[at])
        self._make_room(seq)

    def extend(self, seq: Sequence) -> None:
        """Take the block of the next token, unless the sequence has it; there is one (:meth:`appendable`)."""
        at = seq.length // self.block_size
        for number, table in enumerate(seq.tables):
            if len(table) == at:
                evicted: list[Evicted] = []
                table.extend(self.blocks.take(number, 1, table[-1] if table else 0, evicted))
                self.blocks.announce(evicted)

    # ---- letting go ----------------------------------------------------------------------------

    def release_from(self, seq: Sequence, at: int) -> None:
        """Give back the blocks from table index ``at`` on, in every group, tail first."""
        if len(seq.nodes) > at:
            last = len(seq.nodes) - 1
            self.tails.settle(seq.nodes[last], [table[last] for table in seq.tables])
        for number, (group, table) in enumerate(zip(self.groups, seq.tables, strict=False)):
            group.pool.release(table[at:])
            seq.tables[number] = table[:at]
            seq.dropped[number] = min(seq.dropped[number], at)
        del seq.nodes[at:]

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
            missing = self.index.blocks(number, seq.nodes[first : min(seq.dropped[number], last)]).tolist()
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

    def move_tip(self, old: int, new: int) -> None:
        """The sequence whose tip was ``old`` has the tip ``new`` now."""
        if old != new:
            self.index.pin(new)
            self.index.unpin(old)
