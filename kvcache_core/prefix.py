"""The prefix index: which block holds which tokens, as a tree of blocks."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence

from kvcache_core.keys import block_key, extras_bytes, root_key
from kvcache_core.types import BlockId, NodeId

__all__ = ["PrefixIndex"]

_Extras = Mapping[int, bytes]
_NO_EXTRAS: _Extras = {}


class PrefixIndex:
    """A tree with one node per block of tokens; layer groups attach their block ids to its nodes.

    A *full* node has ``block_size`` tokens and a chained key, and is found by that key in constant time. A
    *tail* is a last block that is not full: an *open* tail is still written by its sequence, a *closed* one
    belongs to no running sequence. The children of a node are kept sorted by their tokens, so the child that
    shares the longest head with a given run of tokens is found by bisection: that is how reuse reaches to
    the token and not only to the block.

    Only the first of several blocks with the same key stands in the index; whoever completes another one is
    handed the first (:meth:`complete`) and gives its own back to the pool.

    Invariants:
        - a node lives while a block, a child or the tip of a sequence needs it, and no longer.
        - block -> node and node -> block agree in every group.
        - every key leads to a full node, and every full node's key leads to it.
        - the children of a node are sorted by their tokens.
    """

    def __init__(self, block_size: int, pool_sizes: Sequence[int]) -> None:
        self.block_size = block_size
        self._by_key: dict[bytes, int] = {}
        self._key: list[bytes | None] = [None]
        self._parent = array("i", [0])
        self._fill = array("i", [0])
        self._uses = array("i", [0])
        self._tokens = array("i", bytes(4 * block_size))
        self._unused: list[int] = []
        self._only_child = array("i", [0])
        self._children: dict[int, list[int]] = {}
        self._open_tails: dict[int, list[int]] = {}
        self._extras: dict[int, _Extras] = {}
        self._in_step: set[int] = set()
        self._block_of = [array("i", [0]) for _ in pool_sizes]
        self._node_of = [array("i", bytes(4 * (size + 1))) for size in pool_sizes]

    def __len__(self) -> int:
        """Nodes in the tree, roots included."""
        return len(self._key) - 1 - len(self._unused)

    # ---- reading -------------------------------------------------------------------------------

    def key(self, node: int) -> bytes | None:
        """The chained key of a root or full node; None for a tail."""
        return self._key[node]

    def parent(self, node: int) -> NodeId:
        """The node before ``node``; 0 for a root."""
        return NodeId(self._parent[node])

    def fill(self, node: int) -> int:
        """How many tokens the node holds."""
        return self._fill[node]

    def is_open(self, node: int) -> bool:
        """Whether the node is a tail that its sequence may still write."""
        return node in self._open_tails.get(self._parent[node], ())

    def tokens(self, node: int) -> array[int]:
        """The node's token ids (int32)."""
        start = node * self.block_size
        return self._tokens[start : start + self._fill[node]]

    def block(self, group: int, node: int) -> BlockId:
        """The block attached in ``group``, or the null block."""
        return BlockId(self._block_of[group][node])

    def node(self, group: int, block: int) -> NodeId:
        """The node that ``block`` of ``group`` is attached to, or 0."""
        return NodeId(self._node_of[group][block])

    def extras(self, node: int) -> _Extras:
        """The node's extra keys, by offset in the block."""
        return self._extras.get(node, _NO_EXTRAS)

    def find(self, key: bytes) -> NodeId | None:
        """The full node with this key."""
        node = self._by_key.get(key)
        return None if node is None else NodeId(node)

    def keys(self, parent_key: bytes, tokens: bytes, start_block: int, extra_keys: _Extras = _NO_EXTRAS) -> list[bytes]:
        """The keys of the full blocks in ``tokens`` (int32 bytes), which start at block ``start_block``."""
        width = 4 * self.block_size
        keys = []
        key = parent_key
        if not extra_keys:
            for start in range(0, len(tokens) - width + 1, width):
                key = block_key(key, tokens[start : start + width])
                keys.append(key)
            return keys
        for start in range(0, len(tokens) - width + 1, width):
            extras = self.block_extras(extra_keys, start_block + start // width)
            key = block_key(key, tokens[start : start + width], extras_bytes(extras))
            keys.append(key)
        return keys

    def block_extras(self, extra_keys: _Extras, block_index: int) -> dict[int, bytes]:
        """The extra keys that fall into one block, by offset in the block."""
        first = block_index * self.block_size
        return {
            position - first: value
            for position, value in extra_keys.items()
            if first <= position < first + self.block_size
        }

    def heads(self, parent: int, tokens: array[int], extras: _Extras = _NO_EXTRAS) -> Iterator[tuple[int, NodeId]]:
        """Children of ``parent`` that start like ``tokens``: (shared tokens, node), longest first."""
        found = [
            (self._shared(node, tokens, extras), node)
            for node in self._open_tails.get(parent, ())
            if node not in self._in_step
        ]
        children = self._children.get(parent)
        if children is None:
            only = self._only_child[parent]
            children = [only] if only else []
        if extras or self._extras:
            # Extra keys are not part of the sort order: look at every child.
            found += [(self._shared(node, tokens, extras), node) for node in children]
            children = []
        yield from self._merge_heads(sorted(found), children, tokens)

    def _merge_heads(
        self, found: list[tuple[int, int]], children: list[int], tokens: array[int]
    ) -> Iterator[tuple[int, NodeId]]:
        """Walk outwards from where ``tokens`` would stand among the sorted children."""
        right = bisect_left(children, tokens.tobytes(), key=self._sort_key)
        left = right - 1
        while True:
            best_left = self._shared(children[left], tokens) if left >= 0 else 0
            best_right = self._shared(children[right], tokens) if right < len(children) else 0
            best_open = found[-1][0] if found else 0
            best = max(best_left, best_right, best_open)
            if not best:
                return
            if best == best_open:
                yield best, NodeId(found.pop()[1])
            elif best == best_right:
                yield best, NodeId(children[right])
                right += 1
            else:
                yield best, NodeId(children[left])
                left -= 1

    def _shared(self, node: int, tokens: array[int], extras: _Extras = _NO_EXTRAS) -> int:
        """How many leading tokens (with equal extra keys) ``node`` shares with ``tokens``."""
        count = 0
        for mine, theirs in zip(self.tokens(node), tokens, strict=False):
            if mine != theirs:
                break
            count += 1
        own = self._extras.get(node, _NO_EXTRAS)
        if own or extras:
            for offset in sorted({*own, *extras}):
                if offset < count and own.get(offset) != extras.get(offset):
                    return offset
        return count

    def _sort_key(self, node: int) -> bytes:
        return self.tokens(node).tobytes()

    # ---- writing -------------------------------------------------------------------------------

    def open_root(self, namespace: bytes, salt: bytes) -> NodeId:
        """The root for a namespace and salt, with one use for the caller to :meth:`unpin`."""
        key = root_key(self.block_size, namespace, salt)
        root = self._by_key.get(key)
        if root is None:
            root = self._new_node(0)
            self._key[root] = key
            self._by_key[key] = root
        self._uses[root] += 1
        return NodeId(root)

    def pin(self, node: int) -> None:
        """Keep a node alive: it is the tip of a sequence."""
        self._uses[node] += 1

    def unpin(self, node: int) -> None:
        """Undo one :meth:`pin`."""
        self._unuse(node)

    def open_tail(self, parent: int, extras: _Extras = _NO_EXTRAS) -> NodeId:
        """A new empty tail behind ``parent``."""
        node = self._new_node(parent)
        self._uses[parent] += 1
        self._open_tails.setdefault(parent, []).append(node)
        if extras:
            self._extras[node] = dict(extras)
        return NodeId(node)

    def append(self, node: int, tokens: array[int]) -> None:
        """Add tokens to an open tail; the caller keeps within the block."""
        start = node * self.block_size + self._fill[node]
        self._tokens[start : start + len(tokens)] = tokens
        self._fill[node] += len(tokens)

    def begin_step(self, node: int) -> None:
        """A step writes into this open tail: it is not matched until the step ends, for its block may change hands."""
        self._in_step.add(node)

    def end_step(self, node: int) -> None:
        """Undo :meth:`begin_step`, if it was called."""
        self._in_step.discard(node)

    def cut(self, node: int, fill: int) -> None:
        """Drop the tokens of an open tail behind the first ``fill``."""
        self._fill[node] = fill

    def attach(self, node: int, group: int, block: int) -> None:
        """Say that ``block`` of ``group`` holds the node's tokens."""
        self._block_of[group][node] = block
        self._node_of[group][block] = node
        self._uses[node] += 1

    def detach(self, group: int, block: int) -> None:
        """The block's content is gone (evicted or overwritten)."""
        node = self._node_of[group][block]
        if node:
            self._node_of[group][block] = 0
            self._block_of[group][node] = 0
            self._unuse(node)

    def complete(self, node: int, key: bytes | None = None) -> NodeId:
        """Give a full tail its key; returns the node that stands for it from now on.

        That is ``node`` itself, or the node that had the key before.
        """
        if key is None:
            parent_key = self._key[self._parent[node]] or b""
            extras = extras_bytes(self._extras.get(node, _NO_EXTRAS))
            key = block_key(parent_key, self._sort_key(node), extras)
        known = self._by_key.setdefault(key, node)
        if known == node:
            self._key[node] = key
            self._close(node)
        return NodeId(known)

    def close_tail(self, node: int) -> None:
        """An open tail loses its sequence but stays findable."""
        self._close(node)

    def move_block(self, group: int, moves: Mapping[BlockId, BlockId], num_blocks: int) -> None:
        """Rename blocks after a resize of the pool to ``num_blocks``."""
        old, self._node_of[group] = self._node_of[group], array("i", bytes(4 * (num_blocks + 1)))
        for block, node in enumerate(old):
            if node:
                new = moves.get(BlockId(block), BlockId(block))
                self._node_of[group][new] = node
                self._block_of[group][node] = new

    def check_valid(self, tips: Mapping[int, int]) -> None:
        """Assert every invariant of the class docstring; expensive, for tests.

        Args:
            tips: how many sequences have pinned each node.
        """
        alive = set(range(1, len(self._key))) - set(self._unused)
        needed = {node: tips.get(node, 0) for node in alive}
        for node in alive:
            assert self._uses[node] > 0
            if self._parent[node]:
                needed[self._parent[node]] += 1
            for blocks in self._block_of:
                needed[node] += blocks[node] != 0
        assert all(needed[node] == self._uses[node] for node in alive)
        for blocks, nodes in zip(self._block_of, self._node_of, strict=True):
            attached = {block: node for node, block in enumerate(blocks) if block}
            assert attached == {block: node for block, node in enumerate(nodes) if node}
        keyed = {node: key for node, key in enumerate(self._key) if key is not None}
        assert {key: node for node, key in keyed.items()} == self._by_key
        for parent, children in self._children.items():
            assert len(children) > 1 and not self._only_child[parent]
            assert all(self._parent[child] == parent for child in children)
            assert [*children] == sorted(children, key=self._sort_key)

    # ---- nodes ---------------------------------------------------------------------------------

    def _new_node(self, parent: int) -> int:
        if self._unused:
            node = self._unused.pop()
        else:
            node = len(self._key)
            self._key.append(None)
            for column in (self._parent, self._fill, self._uses, self._only_child, *self._block_of):
                column.append(0)
            self._tokens.extend(self._tokens[: self.block_size])
        self._parent[node] = parent
        self._fill[node] = 0
        return node

    def _close(self, node: int) -> None:
        """Move an open tail among the sorted children of its parent."""
        parent = self._parent[node]
        tails = self._open_tails[parent]
        tails.remove(node)
        if not tails:
            del self._open_tails[parent]
        children = self._children.get(parent)
        if children is None:
            only = self._only_child[parent]
            if not only:
                self._only_child[parent] = node
                return
            self._only_child[parent] = 0
            children = self._children[parent] = [only]
        children.insert(bisect_left(children, self._sort_key(node), key=self._sort_key), node)

    def _unuse(self, node: int) -> None:
        self._uses[node] -= 1
        while node and not self._uses[node]:
            parent = self._parent[node]
            self._remove(node, parent)
            if parent:
                self._uses[parent] -= 1
            node = parent

    def _remove(self, node: int, parent: int) -> None:
        key = self._key[node]
        if key is not None:
            del self._by_key[key]
            self._key[node] = None
        if parent:
            self._remove_child(node, parent)
        self._extras.pop(node, None)
        self._unused.append(node)

    def _remove_child(self, node: int, parent: int) -> None:
        if self._only_child[parent] == node:
            self._only_child[parent] = 0
            return
        tails = self._open_tails.get(parent)
        if tails and node in tails:
            tails.remove(node)
            if not tails:
                del self._open_tails[parent]
            return
        children = self._children[parent]
        at = bisect_left(children, self._sort_key(node), key=self._sort_key)
        # Equal heads may stand side by side: two closed tails with the same tokens but other extra keys.
        while children[at] != node:
            at += 1
        del children[at]
        if len(children) == 1:
            self._only_child[parent] = children[0]
            del self._children[parent]
