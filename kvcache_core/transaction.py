"""Commit a step, and let go of blocks: where tokens become part of their sequences and of the index."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as _Sequence

import numpy as np

from kvcache_core.keys import block_extras
from kvcache_core.match import first_visible_block
from kvcache_core.plan import Reservation
from kvcache_core.sequence import Sequence
from kvcache_core.tails import Tails
from kvcache_core.types import TokenArray, id_array

__all__ = ["Transactions"]


class Transactions:
    """The moves between sequences, pools and the prefix index that come after the bytes are written."""

    def __init__(self, tails: Tails) -> None:
        self.tails = tails
        self.blocks = tails.blocks
        self.groups = tails.groups
        self.index = tails.index
        self.block_size = tails.block_size
        self._has_states = any(group.kind == "state" for group in self.groups)
        self._has_windows = any(group.window is not None for group in self.groups)

    # ---- whole steps ---------------------------------------------------------------------------

    def commit(self, row: Reservation) -> None:
        """The row's tokens are in the store: make them part of the sequence and publish full blocks."""
        seq, tokens, size = row.seq, row.tokens, self.block_size
        if row.extra_keys:
            seq.extra_keys.update(row.extra_keys)
        old_tip = seq.tip
        self.index.end_step(old_tip)
        if row.room > len(tokens):
            self.index.append(old_tip, tokens)
            if row.extra_keys:
                self._key_tail(seq)
            seq.length += len(tokens)
            seq.room = row.room - len(tokens)
            seq.in_step = False
            return
        if row.copied is not None:
            (self.tails.swap if row.own_tail else self.tails.replace)(seq, row.copied)
        count, done = len(tokens), 0
        at, offset = divmod(seq.length, size)
        if offset:
            done = min(size - offset, count)
            self.index.append(seq.nodes[at], tokens[:done])
            if row.extra_keys:
                self._key_tail(seq)
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

    def _key_tail(self, seq: Sequence) -> None:
        """Tell the unfinished last block of the extra keys that came with new tokens."""
        at = seq.length // self.block_size
        self.index.set_extras(seq.nodes[at], block_extras(seq.extra_keys, at, self.block_size))

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
            blocks = [id_array(table[start:end]) for table in seq.tables]
            nodes = index.add_chain(parent, tokens[done:], blocks)
            if seq.extra_keys:
                for number, node in enumerate(nodes, start):
                    index.set_extras(node, block_extras(seq.extra_keys, number, self.block_size))
            for group, held in zip(self.groups, blocks, strict=False):
                group.pool.mark_all_findable(held)
            seq.nodes += nodes
            for number, held in enumerate(blocks):
                self.blocks.published(number, held)
        seq.length += tokens.size

    # ---- one token -----------------------------------------------------------------------------

    def prepare(self, seqs: _Sequence[Sequence]) -> bool:
        """Take the block of each sequence's next token; False if that takes a step: then nothing was changed.

        For sequences that have no room in their last block.
        """
        lacking: list[Sequence] = []
        for seq in seqs:
            if seq.length % self.block_size:
                if self._has_states or not self.tails.is_private(seq):
                    return False
            elif _lacks_block(seq):
                if seq.max_length > seq.length:
                    return False
                lacking.append(seq)
        if lacking and min([group.pool.num_available for group in self.groups]) < len(lacking):
            return False
        for seq in lacking:
            for number, table in enumerate(seq.tables):
                if len(table) == len(seq.nodes):
                    table.append(self.blocks.take_one(number, table[-1] if table else 0))
        return True

    def append_in_room(self, seq: Sequence, token: int) -> None:
        """Add a token to a sequence that has room."""
        index, size, room = self.index, self.block_size, seq.room
        node, fill = seq.nodes[-1], size - room
        index.token_at[node * size + fill] = token
        index.fill_at[node] = fill + 1
        seq.length += 1
        seq.room = room - 1
        if room == 1:
            self.tails.publish(seq, len(seq.nodes) - 1)
            self.move_tip(node, seq.nodes[-1])

    def append_all(self, seqs: _Sequence[Sequence], tokens: array[int]) -> None:
        """Add a token to each of several sequences that have room or are prepared."""
        index, size = self.index, self.block_size
        token_at, fill_at = index.token_at, index.fill_at
        for seq, token in zip(seqs, tokens, strict=True):
            room = seq.room
            if room > 1:
                # As append_in_room does, without a call for each.
                node, fill = seq.nodes[-1], size - room
                token_at[node * size + fill] = token
                fill_at[node] = fill + 1
                seq.length += 1
                seq.room = room - 1
                continue
            (self.append_in_room if room else self.append)(seq, token)
            # A new block may have moved the columns.
            token_at, fill_at = index.token_at, index.fill_at

    def append(self, seq: Sequence, token: int) -> None:
        """Add a token to a prepared sequence that has no room."""
        at, fill = divmod(seq.length, self.block_size)
        old_tip = seq.tip
        tip = old_tip if fill else self.tails.open_block(seq)
        self.index.append_one(tip, token)
        seq.length += 1
        seq.cut_tail = False
        if fill + 1 == self.block_size:
            self.tails.publish(seq, at)
            tip = seq.nodes[at]
        if tip != old_tip:
            self.index.move_pin(old_tip, tip)
        if fill or self._has_windows:
            self._make_room(seq)
        else:
            # Nobody else knows the new block yet.
            seq.room = self.block_size - 1
            if seq.room:
                self.index.claim(tip, seq)

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
            self.index.move_pin(old, new)


def _lacks_block(seq: Sequence) -> bool:
    """Whether some table of a sequence that ends at a block's end has no block for the next token."""
    at = len(seq.nodes)
    for table in seq.tables:  # noqa: SIM110 a loop is faster here
        if len(table) == at:
            return True
    return False
