"""The prefix index: which block holds which tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from kvcache_core.blocktree import BlockTree
from kvcache_core.children import MANY, NO_EXTRAS, Extras
from kvcache_core.keys import block_extras, block_key, extras_bytes, root_key
from kvcache_core.types import NodeId, TokenArray, id_array

__all__ = ["PrefixIndex"]


class PrefixIndex(BlockTree):
    """Finds prompts in the tree.

    The tokens themselves are compared, so nothing is ever found by a collision, and nothing is hashed to find it.
    Where each node has one child, the usual case, a chain is compared as one piece.

    The children of a node are kept sorted by their tokens, so a child with given tokens, or the one that shares
    the longest head with them, is found by bisection: that is how reuse reaches to the token and not only to the
    block.
    """

    def key(self, node: int) -> bytes | None:
        """The chained key of a root or full node; None for a tail. Made when asked for, and then remembered."""
        return self._chained(node, self._known_keys)

    def keys_in(self, nodes: Sequence[int], namespace: bytes) -> list[bytes | None]:
        """The keys that nodes would have in another namespace."""
        known: dict[int, bytes] = {}
        return [self._chained(node, known, namespace) for node in nodes]

    def salts(self, namespace: bytes) -> list[bytes]:
        """The salts under which something lies in a namespace."""
        return [salt for own, salt in self._roots if own == namespace]

    def _chained(self, node: int, known: dict[int, bytes], namespace: bytes | None = None) -> bytes | None:
        """A node's key, from its nearest ancestor whose key is in ``known``; what is made on the way goes there too."""
        chain = []
        at = node
        while at not in known and at not in self._root_of:
            if self.fill_at[at] < self.block_size or at in self._open:
                return None
            chain.append(at)
            at = self._parent[at]
        key = known.get(at)
        if key is None:
            own, salt = self._root_of[at]
            key = root_key(self.block_size, own if namespace is None else namespace, salt)
        for at in reversed(chain):
            key = block_key(key, self.token_bytes(at), extras_bytes(self.extras(at)))
            known[at] = key
        return key

    def walk(self, root: int, tokens: TokenArray, limit: int, extra_keys: Extras = NO_EXTRAS) -> list[int]:
        """The longest chain of full nodes behind ``root`` with the first blocks of ``tokens``, at most ``limit``."""
        data, width = tokens.tobytes(), self._width
        with_extras = bool(extra_keys or self._extras)
        nodes: list[int] = []
        node, stride = root, 64
        while len(nodes) < limit:
            at = len(nodes)
            extras = block_extras(extra_keys, at, self.block_size) if with_extras else NO_EXTRAS
            node = self.child(node, data[at * width : (at + 1) * width], extras)
            if not node:
                break
            nodes.append(node)
            if not with_extras:
                chain = self._only_chain(node, min(stride, limit - at - 1))
                same = self._count_equal(chain, data, at + 1)
                nodes += chain[:same]
                if same < len(chain):
                    break
                node = nodes[-1]
                stride *= 4
        return nodes

    def _only_chain(self, node: int, limit: int) -> list[int]:
        """The full nodes behind ``node``, each the only child of the one before; at most ``limit``."""
        only, chain = self._only_child, list[int]()
        while len(chain) < limit and (node := only[node]) > 0:
            chain.append(node)
        if chain and self.fill_at[chain[-1]] < self.block_size:
            chain.pop()
        return chain

    def _count_equal(self, chain: list[int], data: bytes, at: int) -> int:
        """How many nodes of ``chain`` have the tokens of ``data`` from block ``at`` on."""
        if not chain:
            return 0
        own = self._token_rows.take(id_array(chain), axis=0).tobytes()
        wanted = data[at * self._width : (at + len(chain)) * self._width]
        if own == wanted:
            return len(chain)
        differ = np.frombuffer(own, np.int32) != np.frombuffer(wanted, np.int32)
        return int(differ.argmax()) // self.block_size

    def heads(self, parent: int, tokens: TokenArray, extras: Extras = NO_EXTRAS) -> Iterator[tuple[int, NodeId]]:
        """Children of ``parent`` that start like ``tokens``: (shared tokens, node), longest first."""
        tails = self._open_tails.get(parent, ())
        found = [(self._shared(node, tokens, extras), node) for node in tails if node not in self._in_step]
        only = self._only_child[parent]
        lefts: Iterator[int] = iter(())
        rights: Iterator[int] = iter((only,) if only > 0 else ())
        if only == MANY:
            lefts, rights = self._children[parent].around(tokens.tobytes())
        if extras or self._extras:
            # Extra keys are not part of the sort order: look at every child.
            found += [(self._shared(node, tokens, extras), node) for node in (*lefts, *rights)]
        yield from self._merge_heads(sorted(found), lefts, rights, tokens)

    def _merge_heads(
        self, found: list[tuple[int, int]], lefts: Iterator[int], rights: Iterator[int], tokens: TokenArray
    ) -> Iterator[tuple[int, NodeId]]:
        """Walk outwards from where ``tokens`` would stand among the sorted children."""
        left, right = next(lefts, 0), next(rights, 0)
        while True:
            best_left = self._shared(left, tokens) if left else 0
            best_right = self._shared(right, tokens) if right else 0
            best_open = found[-1][0] if found else 0
            best = max(best_left, best_right, best_open)
            if not best:
                return
            if best == best_open:
                yield best, NodeId(found.pop()[1])
            elif best == best_right:
                yield best, NodeId(right)
                right = next(rights, 0)
            else:
                yield best, NodeId(left)
                left = next(lefts, 0)

    def _shared(self, node: int, tokens: TokenArray, extras: Extras = NO_EXTRAS) -> int:
        """How many leading tokens (with equal extra keys) ``node`` shares with ``tokens``."""
        if self.token_at[node * self.block_size] != tokens[0]:
            return 0
        count = min(self.fill_at[node], len(tokens))
        differ = self._token_rows[node, :count] != tokens[:count]
        if differ.any():
            count = int(differ.argmax())
        own = self._extras.get(node, NO_EXTRAS)
        if own or extras:
            for offset in sorted({*own, *extras}):
                if offset < count and own.get(offset) != extras.get(offset):
                    return offset
        return count
