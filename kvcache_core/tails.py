"""The last block of a sequence: who may write into it, and what becomes of it."""

from __future__ import annotations

from collections.abc import Sequence as _Sequence

from kvcache_core.eviction import Blocks
from kvcache_core.keys import block_extras
from kvcache_core.sequence import Sequence
from kvcache_core.types import Evicted

__all__ = ["Tails"]


class Tails:
    """Starts, copies, takes over, publishes and settles the unfinished last blocks of sequences."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        self.index = blocks.index
        self.groups = blocks.groups
        self.block_size = blocks.block_size
        self._has_states = any(group.kind == "state" for group in blocks.groups)

    # ---- may it be written ---------------------------------------------------------------------

    def is_private(self, seq: Sequence) -> bool:
        """Whether the sequence is in the middle of an open tail that ends where it ends and nobody else holds."""
        index = self.index
        at, offset = divmod(seq.length, self.block_size)
        if not offset:
            return False
        node = seq.nodes[at]
        if index.fill(node) != offset or not index.is_open(node):
            return False
        return self.held_alone(seq) and not self._has_outputs(seq, node)

    def must_copy(self, seq: Sequence) -> bool:
        """Whether the next token falls into a block that others hold or that is already findable."""
        at, offset = divmod(seq.length, self.block_size)
        if not offset:
            return False
        node = seq.nodes[at]
        if self._has_outputs(seq, node):
            # Stored outputs belong to the tail, and this sequence stores none: it must not grow under them.
            return True
        if self.index.fill(node) > offset and not seq.cut_tail:
            # The rest of the tail is of a closed sequence that this one was matched with: it stays findable.
            return True
        return not (self.index.is_open(node) and self.held_alone(seq))

    def held_alone(self, seq: Sequence) -> bool:
        """Whether no other sequence holds the block that the sequence ends in, in any group."""
        at = seq.length // self.block_size
        for group, table in zip(self.groups, seq.tables, strict=False):  # noqa: SIM110 a loop is faster here
            if group.pool.ref[table[at]] != 1:
                return False
        return True

    def _has_outputs(self, seq: Sequence, node: int) -> bool:
        used, known = len(seq.tables), len(self.groups)
        return used < known and any(self.index.block(number, node) for number in range(used, known))

    # ---- start and replace ---------------------------------------------------------------------

    def open_block(self, seq: Sequence) -> int:
        """A new open tail behind the sequence, in the blocks that its tables have for it."""
        node = self._start(seq.tip, seq, len(seq.nodes))
        seq.nodes.append(node)
        return node

    def replace(self, seq: Sequence, copied: list[int]) -> None:
        """The shared tail was copied: go on in the copy and let go of the original."""
        at = seq.length // self.block_size
        old = seq.nodes[at]
        node = self._start(self.index.parent(old), seq, at)
        self.index.append(node, self.index.tokens(old)[: seq.length % self.block_size])
        seq.nodes[at] = node
        self.settle(old, copied)
        for group, block in zip(self.groups, copied, strict=False):
            group.pool.release([block])

    def swap(self, seq: Sequence, replaced: list[int]) -> None:
        """The step wrote new states beside the old ones, ``replaced`` (0 where the block stays): let go of the old."""
        node = seq.nodes[seq.length // self.block_size]
        for number, (group, block) in enumerate(zip(self.groups, replaced, strict=False)):
            if block:
                self.index.detach(number, block)
                self.index.attach(node, number, seq.tables[number][seq.length // self.block_size])
                group.pool.release([block])

    def take_over(self, seq: Sequence) -> None:
        """Turn a findable tail that only ``seq`` holds into its own open tail: it is evicted in place."""
        at = seq.length // self.block_size
        old = seq.nodes[at]
        evicted: list[Evicted] = []
        for number, (group, table) in enumerate(zip(self.groups, seq.tables, strict=False)):
            group.pool.unmark_findable(table[at])
            self.blocks.evict(number, [table[at]], evicted)
        self.blocks.announce(evicted)
        # The sequence's pin still keeps the old node.
        node = self._start(self.index.parent(old), seq, at)
        self.index.append(node, self.index.tokens(old)[: seq.length % self.block_size])
        self.index.move_pin(old, node)
        seq.nodes[at] = node

    def _start(self, parent: int, seq: Sequence, at: int) -> int:
        """A new open tail in the blocks that the sequence's tables have at ``at``."""
        extras = block_extras(seq.extra_keys, at, self.block_size) if seq.extra_keys else {}
        return self.index.open_tail(parent, extras, [table[at] for table in seq.tables])

    # ---- publish and settle --------------------------------------------------------------------

    def publish(self, seq: Sequence, at: int) -> None:
        """Make a full block findable; if its twin already is, use the twin and give this one back."""
        node = seq.nodes[at]
        known = self.index.complete(node)
        if known != node:
            seq.nodes[at] = known
            for number, table in enumerate(seq.tables):
                self.index.detach(number, table[at])
                self.groups[number].pool.unmark_findable(table[at])
            self.use_twin(seq, at, known)
            return
        for number, (group, table) in enumerate(zip(self.groups, seq.tables, strict=False)):
            group.pool.mark_findable(table[at])
            self.blocks.published(number, [table[at]])

    def use_twin(self, seq: Sequence, at: int, known: int) -> None:
        """Give back the blocks at ``at``, which no node has, for those of the full node ``known``."""
        for number, (group, table) in enumerate(zip(self.groups, seq.tables, strict=False)):
            mine, twin = table[at], self.index.block(number, known)
            if twin:
                group.pool.retain([twin])
                group.pool.release([mine])
                seq.tables[number] = [*table[:at], twin, *table[at + 1 :]]
            else:
                # The twin lost its block in this group (a window let it go): ours fills the hole.
                self.index.attach(known, number, mine)
                group.pool.mark_findable(mine)
                self.blocks.published(number, [mine])

    def settle(self, node: int, blocks: _Sequence[int]) -> None:
        """Before the last holder lets go of an open tail: keep it findable, unless that adds nothing."""
        if not self.index.is_open(node):
            return
        alone = [group.pool.ref[block] == 1 for group, block in zip(self.groups, blocks, strict=False)]
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
            if self._has_states and self.index.fill(other) > len(tokens):
                continue  # its state is behind more tokens
            if other != node and not self.index.is_open(other):
                return all(
                    self.index.block(number, other) or not self.index.block(number, node)
                    for number in range(len(self.groups))
                )
        return False
