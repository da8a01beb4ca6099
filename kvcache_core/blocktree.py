"""The tree of blocks of tokens: how nodes come, hang together and go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kvcache_core.children import MANY, NO_EXTRAS, Extras, SortedChildren
from kvcache_core.types import BlockArray, NodeId, TokenArray, id_array

__all__ = ["BlockTree"]


class BlockTree(SortedChildren):
    """One node per block of tokens; layer groups attach their block ids to its nodes.

    A *full* node has ``block_size`` tokens. A *tail* is a last block that is not full: an *open* tail is still
    written by its sequence, a *closed* one belongs to no running sequence.

    Only the first of several full nodes with the same tokens and extra keys stands behind a parent; whoever
    completes another one is handed the first (:meth:`complete`) and gives its own block back to the pool.

    Invariants:
        - a node lives while a block, a child or the tip of a sequence needs it, and no longer.
        - block -> node and node -> block agree in every group.
    """

    def __init__(self, block_size: int, pool_sizes: Sequence[int]) -> None:
        super().__init__(block_size, pool_sizes)
        self._open_tails: dict[int, list[int]] = {}
        self._open: dict[int, object] = {}
        """Open tails, each with who may write it without looking (see :meth:`claim`), or None."""
        self._in_step: set[int] = set()
        self._known_keys: dict[int, bytes] = {}

    def is_open(self, node: int) -> bool:
        """Whether the node is a tail that its sequence may still write."""
        return node in self._open

    # ---- writing -------------------------------------------------------------------------------

    def unpin(self, node: int) -> None:
        """Undo one :meth:`pin`."""
        self._unuse(node)

    def move_pin(self, old: int, new: int) -> None:
        """:meth:`pin` one node and :meth:`unpin` another."""
        self._uses[new] += 1
        self._unuse(old)

    def open_tail(self, parent: int, extras: Extras = NO_EXTRAS, blocks: Sequence[int] = ()) -> NodeId:
        """A new empty tail behind ``parent``, in ``blocks`` (one per group, or none yet)."""
        node = self._new_row()
        self._parent[node] = parent
        self.fill_at[node] = self._only_child[node] = 0
        self._uses[node] = len(blocks)
        self._uses[parent] += 1
        for group, block in enumerate(blocks):
            self._block_at[group][node] = block
            self._node_at[group][block] = node
        tails = self._open_tails.get(parent)
        if tails is None:
            self._open_tails[parent] = [node]
        else:
            tails.append(node)
        self._open[node] = None
        if extras:
            self._extras[node] = extras
        return NodeId(node)

    def add_chain(self, parent: int, tokens: TokenArray, blocks: Sequence[BlockArray]) -> list[int]:
        """A chain of full nodes behind ``parent``, which has no child with the first one's tokens; returns them.

        Args:
            parent: the node that the chain hangs on.
            tokens: int32 [blocks, block_size].
            blocks: per group, the block of each node.
        """
        rows = self._new_rows(len(tokens))
        nodes: list[int] = rows.tolist()
        first, last = nodes[0], nodes[-1]
        where = slice(first, last + 1) if last - first == len(rows) - 1 else rows
        self._token_rows[where] = tokens
        self._fills[where] = self.block_size
        self._use_counts[where] = len(blocks) + 1
        self._uses[last] -= 1
        links = np.zeros(len(rows), np.int32)
        links[:-1] = rows[1:]
        self._columns["only"][where] = links
        links[0] = parent
        links[1:] = rows[:-1]
        self._parents[where] = links
        for group, held in enumerate(blocks):
            self._blocks[group][where] = held
            self._nodes[group].put(held, rows)
        self._uses[parent] += 1
        self._link(first, parent)
        return nodes

    def set_extras(self, node: int, extras: Extras) -> None:
        """Give a new node, or an open tail, its extra keys."""
        if extras:
            self._extras[node] = extras

    def claim(self, node: int, writer: object) -> None:
        """Remember who writes the open tail alone; it has to be told when somebody else takes the tail."""
        self._open[node] = writer

    def writer(self, node: int) -> object:
        """Who claimed the open tail last; None for nobody, and for a node that is no open tail."""
        return self._open.get(node)

    def begin_step(self, node: int) -> None:
        """A step writes into this open tail: it is not matched until the step ends, for its block may change hands."""
        self._in_step.add(node)

    def end_step(self, node: int) -> None:
        """Undo :meth:`begin_step`, if it was called."""
        self._in_step.discard(node)

    def detach(self, group: int, block: int) -> None:
        """The block's content is gone (evicted or overwritten)."""
        node = self._node_at[group][block]
        if node:
            self._node_at[group][block] = 0
            self._block_at[group][node] = 0
            self._unuse(node)

    def detach_all(self, group: int, blocks: Sequence[int]) -> None:
        """:meth:`detach` many blocks that were evicted; whole chains, given tail first, go as one piece."""
        if len(blocks) < 8:
            for block in blocks:
                self.detach(group, block)
            return
        ids = id_array(blocks)
        nodes = self._nodes[group].take(ids)
        self._nodes[group].put(ids, 0)
        self._blocks[group].put(nodes, 0)
        uses = self._use_counts.take(nodes) - 1
        self._use_counts.put(nodes, uses)
        parents = self._parents.take(nodes)
        # In a chain each node is the parent of the one before, and that is the last use it has.
        inside = parents[:-1] == nodes[1:]
        uses[1:] -= inside
        if np.count_nonzero(uses):
            # Something else hangs on one of them.
            for node in nodes.tolist():
                if self._parent[node] and not self._uses[node]:  # else needed, or gone with an earlier one
                    self._remove(node)
            return
        if self._extras or self._known_keys:
            for node in nodes.tolist():
                self._forget(node)
        for top in [*nodes[:-1][~inside].tolist(), int(nodes[-1])]:
            parent = self._parent[top]
            self._cut_off(top, parent)
            self._unuse(parent)
        self._free_rows(nodes)

    def complete(self, node: int) -> NodeId:
        """Close a full tail; returns the node that stands for its tokens from now on.

        That is ``node`` itself, or the full node with the same tokens and extra keys that was there before.
        """
        parent = self._parent[node]
        if not self._only_child[parent]:
            self._drop_open(node, parent)
            self._only_child[parent] = node
            return NodeId(node)
        known = self.child(parent, self.token_bytes(node), self.extras(node))
        if not known:
            self.close_tail(node)
        return NodeId(known or node)

    def close_tail(self, node: int) -> None:
        """An open tail loses its sequence but stays findable: it moves among its parent's sorted children."""
        parent = self._parent[node]
        self._drop_open(node, parent)
        self._link(node, parent)

    def check_valid(self, tips: Mapping[int, int]) -> None:
        """Assert every invariant of the class docstring; expensive, for tests.

        Args:
            tips: how many sequences have pinned each node.
        """
        alive = self.alive()
        needed = {node: tips.get(node, 0) for node in alive}
        for node in alive:
            assert self._uses[node] > 0
            assert (node in self._root_of) == (self._parent[node] == 0)
            if self._parent[node]:
                needed[self._parent[node]] += 1
            for blocks in self._blocks:
                needed[node] += int(blocks[node] != 0)
        assert all(needed[node] == self._uses[node] for node in alive)
        for blocks, nodes in zip(self._blocks, self._nodes, strict=True):
            attached = {int(block): node for node, block in enumerate(blocks) if block}
            assert attached == {block: int(node) for block, node in enumerate(nodes) if node}
            assert set(attached.values()) <= alive
        assert set(self._open) == {node for tails in self._open_tails.values() for node in tails} <= alive
        assert self._in_step <= set(self._open)
        assert set(self._extras) | set(self._known_keys) <= alive
        children = {parent: [*siblings] for parent, siblings in self._children.items()}
        for siblings in self._children.values():
            siblings.check_valid()
        for node in alive:
            assert (self._only_child[node] == MANY) == (node in self._children)
            if self._only_child[node] > 0:
                children[node] = [self._only_child[node]]
        assert sum(map(len, children.values())) + len(self._open) + len(self._roots) == len(alive) == len(self)
        for parent, found in children.items():
            assert len(found) > 1 or parent not in self._children
            assert all(self._parent[child] == parent and child not in self._open for child in found)
            full = [(self.token_bytes(c), *self.extras(c).items()) for c in found if self.fill(c) == self.block_size]
            assert len(set(full)) == len(full)

    def alive(self) -> set[int]:
        """The nodes in the tree, roots included."""
        return set(range(1, self._top)) - set(self._spare[: self._num_spare].tolist())

    # ---- inside --------------------------------------------------------------------------------

    def _cut_off(self, node: int, parent: int) -> None:
        if node in self._open:
            self._drop_open(node, parent)
        else:
            self._unlink(node, parent)

    def _drop_open(self, node: int, parent: int) -> None:
        tails = self._open_tails[parent]
        if len(tails) == 1:
            del self._open_tails[parent]
        else:
            tails.remove(node)
        del self._open[node]

    def _unuse(self, node: int) -> None:
        uses = self._uses[node] - 1
        self._uses[node] = uses
        if not uses:
            self._remove(node)

    def _remove(self, node: int) -> None:
        """Remove a node that nothing needs, and then its parent if that is so too, and so on."""
        while not self._uses[node]:
            parent = self._parent[node]
            self._forget(node)
            self._parent[node] = 0
            self._free_row(node)
            if not parent:
                del self._roots[self._root_of.pop(node)]
                return
            self._cut_off(node, parent)
            self._uses[parent] -= 1
            node = parent

    def _forget(self, node: int) -> None:
        if self._extras:
            self._extras.pop(node, None)
        if self._known_keys:
            self._known_keys.pop(node, None)
