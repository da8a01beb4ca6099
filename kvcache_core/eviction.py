"""What the parts of a step share: the index, the layer groups, and what happens when content is given up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvcache_core.match import LayerGroup
from kvcache_core.prefix import PrefixIndex
from kvcache_core.types import BlockArray, BlockId, Evicted

__all__ = ["Blocks"]


class Blocks:
    """The prefix index and the pools of all layer groups, and who is told when a block loses its content."""

    def __init__(self, index: PrefixIndex, groups: Sequence[LayerGroup]) -> None:
        self.index = index
        self.groups = groups
        self.block_size = index.block_size
        self.evicted_blocks = 0
        self.on_evict: Callable[[list[Evicted]], None] | None = None
        self.on_publish: Callable[[list[Evicted]], None] | None = None

    def take(self, number: int, count: int, after: int, evicted: list[Evicted]) -> list[int]:
        """Blocks of group ``number`` for one sequence; what had to be evicted for them is noted in ``evicted``."""
        taken, lost = self.groups[number].pool.take(count, after)
        if lost:
            self.evict(number, lost, evicted)
        return taken

    def take_one(self, number: int, after: int) -> int:
        """:meth:`take` one block, which must be available, and tell what was evicted for it."""
        block, was_evicted = self.groups[number].pool.take_one(after)
        if was_evicted:
            if self.on_evict is not None:
                self.on_evict(self.describe(number, [block]))
            self.index.detach(number, block)
            self.evicted_blocks += 1
        return block

    def evict(self, number: int, blocks: list[int], evicted: list[Evicted]) -> None:
        """The pool has evicted ``blocks`` of group ``number``: forget what they held, note it in ``evicted``."""
        if self.on_evict is not None:
            evicted += self.describe(number, blocks)
        self.index.detach_all(number, blocks)
        self.evicted_blocks += len(blocks)

    def describe(self, number: int, blocks: Sequence[int]) -> list[Evicted]:
        """What findable blocks of group ``number`` hold."""
        roots: dict[int, bytes] = {}
        found = []
        for block in blocks:
            node = self.index.node(number, block)
            key, parent = self.index.key(node), self.index.key(self.index.parent(node)) or b""
            found.append(Evicted(number, BlockId(block), key, self.index.fill(node), self._root(node, roots), parent))
        return found

    def published(self, number: int, blocks: Sequence[int] | BlockArray) -> None:
        """Tell :attr:`on_publish` that full blocks of group ``number``, head first, can be found from now on."""
        if self.on_publish is not None:
            self.on_publish(self.describe(number, list(map(int, blocks))))

    def announce(self, evicted: list[Evicted]) -> None:
        """Tell :attr:`on_evict`, before anything can overwrite the blocks' bytes."""
        if evicted and self.on_evict is not None:
            self.on_evict(evicted)

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
