"""How the nodes of the tree hang together: roots, and children sorted by their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvcache_core.nodes import NodeTable
from kvcache_core.siblings import Siblings
from kvcache_core.types import NodeId

__all__ = ["MANY", "NO_EXTRAS", "Extras", "SortedChildren"]

Extras = Mapping[int, bytes]
NO_EXTRAS: Extras = {}

MANY = -1
"""In the column of only children: there are several, in a sorted list."""


class SortedChildren(NodeTable):
    """Nodes behind roots, found by namespace and salt, and the children behind each node, found by their tokens.

    A node with one child, the usual case, needs no list. Open tails are no children yet: their tokens still grow.

    Invariant:
        - the children of a node are sorted by their tokens, and no two full ones are equal.
    """

    def __init__(self, block_size: int, pool_sizes: Sequence[int]) -> None:
        super().__init__(block_size, pool_sizes)
        self._roots: dict[tuple[bytes, bytes], int] = {}
        self._root_of: dict[int, tuple[bytes, bytes]] = {}
        self._children: dict[int, Siblings] = {}
        self._extras: dict[int, Extras] = {}

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
        for node in self._children[parent].from_(tokens):
            if self.token_bytes(node) != tokens:
                break
            if self.extras(node) == extras:
                return node
        return 0

    def open_root(self, namespace: bytes, salt: bytes) -> NodeId:
        """The root for a namespace and salt, with one use for the caller to :meth:`unpin`."""
        root = self._roots.get((namespace, salt))
        if root is None:
            root = self._roots[namespace, salt] = self._new_row()
            self._root_of[root] = (namespace, salt)
            self._parent[root] = self.fill_at[root] = self._uses[root] = self._only_child[root] = 0
        self._uses[root] += 1
        return NodeId(root)

    def _link(self, node: int, parent: int) -> None:
        only = self._only_child[parent]
        if not only:
            self._only_child[parent] = node
            return
        if only != MANY:
            self._only_child[parent] = MANY
            self._children[parent] = Siblings(self.token_bytes, only)
        self._children[parent].add(node)

    def _unlink(self, node: int, parent: int) -> None:
        if self._only_child[parent] == node:
            self._only_child[parent] = 0
            return
        siblings = self._children[parent]
        siblings.remove(node)
        if only := siblings.only():
            self._only_child[parent] = only
            del self._children[parent]
