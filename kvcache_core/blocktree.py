"""The tree of blocks of tokens: how nodes come, hang together and go."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

import numpy as np

from kvcache_core.nodes import NodeTable
from kvcache_core.types import BlockArray, NodeId, TokenArray

__all__ = ["MANY", "NO_EXTRAS", "BlockTree", "Extras"]

Extras = Mapping[int, bytes]
NO_EXTRAS: Extras = {}

MANY = -1
"""In the column of only children: there are several, in a sorted list."""


class BlockTree(NodeTable):
    """One node per block of tokens; layer groups attach their block ids to its nodes.

    A *full* node has ``block_size`` tokens. A *tail* is a last block that is not full: an *open* tail is still
    written by its sequence, a *closed* one belongs to no running sequence.

    Only the first of several full nodes with the same tokens and extra keys stands behind a parent; whoever
    completes another one is handed the first (:meth:`complete`) and gives its own block back to the pool.

    Invariants:
        - a node lives while a block, a child or the tip of a sequence needs it, and no longer.
        - block -> node and node -> block agree in every group.
        - the children of a node are sorted by their tokens, and no two full ones are equal.
    """

    def __init__(self, block_size: int, pool_sizes: Sequence[int]) -> None:
        super().__init__(block_size, pool_sizes)
        self._roots: dict[tuple[bytes, bytes], int] = {}
        self._root_of: dict[int, tuple[bytes, bytes]] = {}
        self._children: dict[int, list[int]] = {}
        self._open_tails: dict[int, list[int]] = {}
        self._open: dict[int, object] = {}
        """Open tails, each with who may write it without looking (see :meth:`claim`), or None."""
        self._in_step: set[int] = set()
        self._extras: dict[int, Extras] = {}
        self._known_keys: dict[int, bytes] = {}

    def is_open(self, node: int) -> bool:
        """Whether the node is a tail that its sequence may still write."""
        return node in self._open

    def extras(self, node: int) -> Extras:
        """The node's extra keys, by offset in the block."""
        return self._extras.get(node, NO_EXTRAS)

    def root(self, namespace: bytes, salt: bytes) -> NodeId:
        """The root for a namespace and salt; 0 if nothing stands behind it."""
        return NodeId(self._roots.get((namespace, salt), 0))

    def child(self, parent: int, tokens: bytes, extras: Extras = NO_EXTRAS) -> int:
        """The full node behind ``parent`` with these tokens (int32 bytes of a whole block); 0 if there is none."""
        only = self._only_child[parent]
        if only != MANY:
            return only if only and self.token_bytes(only) == tokens and self.extras(only) == extras else 0
        children = self._children[parent]
        at = bisect_left(children, tokens, key=self.token_bytes)
        while at < len(children) and self.token_bytes(children[at]) == tokens:
            if self.extras(children[at]) == extras:
                return children[at]
            at += 1
        return 0

    # ---- writing -------------------------------------------------------------------------------

    def open_root(self, namespace: bytes, salt: bytes) -> NodeId:
        """The root for a namespace and salt, with one use for the caller to :meth:`unpin`."""
        root = self._roots.get((namespace, salt))
        if root is None:
            root = self._roots[namespace, salt] = self._new_row()
            self._root_of[root] = (namespace, salt)
        self._uses[root] += 1
        return NodeId(root)

    def unpin(self, node: int) -> None:
        """Undo one :meth:`pin`."""
        self._unuse(node)

    def open_tail(self, parent: int, extras: Extras = NO_EXTRAS) -> NodeId:
        """A new empty tail behind ``parent``."""
        node = self._new_row()
        self._parent[node] = parent
        self._uses[parent] += 1
        tails = self._open_tails.get(parent)
        if tails is None:
            self._open_tails[parent] = [node]
        else:
            tails.append(node)
        self._open[node] = None
        self.set_extras(node, extras)
        return NodeId(node)

    def add_chain(self, parent: int, tokens: TokenArray, blocks: Sequence[BlockArray]) -> list[int]:
        """A chain of full nodes behind ``parent``, which has no child with the first one's tokens; returns them.

        Args:
            parent: the node that the chain hangs on.
            tokens: int32 [blocks, block_size].
            blocks: per group, the block of each node.
        """
        count = len(tokens)
        nodes = self._new_rows(count)
        first, last = nodes[0], nodes[-1]
        rows = slice(first, last + 1) if last - first == count - 1 else nodes
        self._token_rows[rows] = tokens
        self._fills[rows] = self.block_size
        self._use_counts[rows] = len(blocks) + 1
        self._uses[last] -= 1
        self._parents[rows] = [parent, *nodes[:-1]]
        self._columns["only"][rows] = [*nodes[1:], 0]
        for group, held in enumerate(blocks):
            self._blocks[group][rows] = held
            self._nodes[group][held] = nodes
        self._uses[parent] += 1
        self._link(first, parent)
        return nodes

    def set_extras(self, node: int, extras: Extras) -> None:
        """Give a new node its extra keys."""
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

    def detach_all(self, group: int, blocks: list[int]) -> None:
        """:meth:`detach` many blocks that were evicted; whole chains, given tail first, go as one piece."""
        if len(blocks) < 8:
            for block in blocks:
                self.detach(group, block)
            return
        nodes = self._nodes[group][blocks]
        self._nodes[group][blocks] = 0
        self._blocks[group][nodes] = 0
        self._use_counts[nodes] -= 1
        parents = self._parents[nodes]
        starts = np.flatnonzero(np.append(True, parents[:-1] != nodes[1:]))
        # A node of a chain has no use left but the child before it in the chain.
        left = np.ones(len(nodes), np.int32)
        left[starts] = 0
        whole = np.logical_and.reduceat(self._use_counts[nodes] == left, starts)
        edges = [*starts.tolist(), len(nodes)]
        for number, all_gone in enumerate(whole.tolist()):
            chain = nodes[edges[number] : edges[number + 1]]
            if all_gone:
                self._remove_chain(chain)
            else:
                for node in chain.tolist():
                    if self._parent[node]:  # not gone with an earlier one
                        self._settle(node)

    def complete(self, node: int) -> NodeId:
        """Close a full tail; returns the node that stands for its tokens from now on.

        That is ``node`` itself, or the full node with the same tokens and extra keys that was there before.
        """
        known = self.child(self._parent[node], self.token_bytes(node), self.extras(node))
        if known:
            return NodeId(known)
        self.close_tail(node)
        return NodeId(node)

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
        children = dict(self._children)
        for node in alive:
            assert (self._only_child[node] == MANY) == (node in self._children)
            if self._only_child[node] > 0:
                children[node] = [self._only_child[node]]
        assert sum(map(len, children.values())) + len(self._open) + len(self._roots) == len(alive) == len(self)
        for parent, found in children.items():
            assert len(found) > 1 or parent not in self._children
            assert all(self._parent[child] == parent and child not in self._open for child in found)
            assert [*found] == sorted(found, key=self.token_bytes)
            full = [(self.token_bytes(c), *self.extras(c).items()) for c in found if self.fill(c) == self.block_size]
            assert len(set(full)) == len(full)

    def alive(self) -> set[int]:
        """The nodes in the tree, roots included."""
        return set(range(1, self._top)) - set(self._spare[: self._num_spare].tolist())

    # ---- inside --------------------------------------------------------------------------------

    def _link(self, node: int, parent: int) -> None:
        only = self._only_child[parent]
        if not only:
            self._only_child[parent] = node
            return
        if only == MANY:
            children = self._children[parent]
        else:
            self._only_child[parent] = MANY
            children = self._children[parent] = [only]
        children.insert(bisect_left(children, self.token_bytes(node), key=self.token_bytes), node)

    def _unlink(self, node: int, parent: int) -> None:
        if self._only_child[parent] == node:
            self._only_child[parent] = 0
            return
        if node in self._open:
            self._drop_open(node, parent)
            return
        children = self._children[parent]
        at = bisect_left(children, self.token_bytes(node), key=self.token_bytes)
        # Equal heads may stand side by side: two closed tails with the same tokens but other extra keys.
        while children[at] != node:
            at += 1
        del children[at]
        if len(children) == 1:
            self._only_child[parent] = children[0]
            del self._children[parent]

    def _drop_open(self, node: int, parent: int) -> None:
        tails = self._open_tails[parent]
        if len(tails) == 1:
            del self._open_tails[parent]
        else:
            tails.remove(node)
        del self._open[node]

    def _unuse(self, node: int) -> None:
        self._uses[node] -= 1
        self._settle(node)

    def _settle(self, node: int) -> None:
        """Remove the node if nothing needs it, and then its parent, and so on."""
        while node and not self._uses[node]:
            parent = self._parent[node]
            self._forget(node)
            if parent:
                self._unlink(node, parent)
                self._uses[parent] -= 1
            else:
                del self._roots[self._root_of.pop(node)]
            self._free_row(node)
            node = parent

    def _remove_chain(self, chain: BlockArray) -> None:
        """Remove nodes, each the next one's only child; then settle what the last one hung on."""
        if self._extras or self._known_keys:
            for node in chain.tolist():
                self._forget(node)
        last = int(chain[-1])
        parent = self._parent[last]
        self._unlink(last, parent)
        self._uses[parent] -= 1
        self._use_counts[chain] = 0
        self._free_rows(chain)
        self._settle(parent)

    def _forget(self, node: int) -> None:
        self._extras.pop(node, None)
        self._known_keys.pop(node, None)
