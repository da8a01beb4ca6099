"""The storage of the prefix index: columns of numbers, one row per block of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kvcache_core.types import BlockArray, BlockId, NodeId, TokenArray, id_array, view

__all__ = ["NodeTable"]


class NodeTable:
    """Rows of the tree: tokens, parent, use count, and the blocks that hold a node's state in each layer group.

    No Python object per node: columns are numpy arrays, for chains as a whole, and each has a memoryview on
    the same memory, for single entries at a list's speed. Zero pages that were never used take no memory.

    A node lives while a block, a child or the tip of a sequence needs it; ``uses`` counts them.

    Attributes:
        fill_at: how many tokens each node holds.
        token_at: the tokens, one behind the other: ``block_size`` places for each node.

    Args:
        block_size: tokens per block.
        pool_sizes: blocks of each layer group.
    """

    def __init__(self, block_size: int, pool_sizes: Sequence[int]) -> None:
        self.block_size = block_size
        self._width = 4 * block_size
        self._top = 1
        """The first row that was never used; row 0 stands for no node."""
        self._num_spare = 0
        rows = max(pool_sizes) + 64
        self._columns = {name: np.zeros(rows, np.int32) for name in ("parent", "fill", "uses", "only", "spare")}
        self._token_rows: TokenArray = np.zeros((rows, block_size), np.int32)
        self._blocks: list[BlockArray] = [np.zeros(rows, np.int32) for _ in pool_sizes]
        self._nodes: list[BlockArray] = [np.zeros(size + 1, np.int32) for size in pool_sizes]
        self._node_at = list(map(view, self._nodes))
        self._see()

    def _see(self) -> None:
        """Take views of the columns; again whenever they grew."""
        columns = self._columns
        self._parents, self._fills, self._use_counts = columns["parent"], columns["fill"], columns["uses"]
        self._parent, self.fill_at, self._uses, self._only_child, self._spare = map(view, columns.values())
        self._bytes = view(self._token_rows).cast("B")
        self.token_at = self._bytes.cast("i")
        self._block_at = list(map(view, self._blocks))

    def __len__(self) -> int:
        """Nodes in the tree, roots included."""
        return self._top - 1 - self._num_spare

    # ---- reading -------------------------------------------------------------------------------

    def parent(self, node: int) -> NodeId:
        """The node before ``node``; 0 for a root."""
        return NodeId(self._parent[node])

    def fill(self, node: int) -> int:
        """How many tokens the node holds."""
        count: int = self.fill_at[node]
        return count

    def tokens(self, node: int) -> TokenArray:
        """The node's token ids; a view."""
        return self._token_rows[node, : self.fill_at[node]]

    def tokens_of(self, nodes: Sequence[int]) -> list[int]:
        """The token ids of the chain ``nodes``; the last one may be a tail."""
        if not nodes:
            return []
        size, last = self.block_size, nodes[-1]
        found: list[int] = self._token_rows[nodes].ravel()[: (len(nodes) - 1) * size + self.fill_at[last]].tolist()
        return found

    def token_bytes(self, node: int) -> bytes:
        """The node's token ids as little-endian int32: what siblings are sorted by."""
        start = node * self._width
        return self._bytes[start : start + 4 * self.fill_at[node]].tobytes()

    def block(self, group: int, node: int) -> BlockId:
        """The block attached in ``group``, or the null block."""
        return BlockId(self._block_at[group][node])

    def blocks(self, group: int, nodes: Sequence[int]) -> BlockArray:
        """The blocks attached in ``group`` to each of ``nodes``; null where there is none."""
        return self._blocks[group].take(id_array(nodes))

    def node(self, group: int, block: int) -> NodeId:
        """The node that ``block`` of ``group`` is attached to, or 0."""
        return NodeId(self._node_at[group][block])

    # ---- writing -------------------------------------------------------------------------------

    def append(self, node: int, tokens: Sequence[int] | TokenArray) -> None:
        """Add tokens to an open tail; the caller keeps within the block."""
        fill = self.fill_at[node]
        self._token_rows[node, fill : fill + len(tokens)] = tokens
        self.fill_at[node] = fill + len(tokens)

    def append_one(self, node: int, token: int) -> None:
        """:meth:`append` a single token."""
        fill = self.fill_at[node]
        self.token_at[node * self.block_size + fill] = token
        self.fill_at[node] = fill + 1

    def cut(self, node: int, fill: int) -> None:
        """Drop the tokens of an open tail behind the first ``fill``."""
        self.fill_at[node] = fill

    def pin(self, node: int) -> None:
        """Keep a node alive: it is the tip of a sequence."""
        self._uses[node] += 1

    def attach(self, node: int, group: int, block: int) -> None:
        """Say that ``block`` of ``group`` holds the node's tokens."""
        self._block_at[group][node] = block
        self._node_at[group][block] = node
        self._uses[node] += 1

    def move_block(self, group: int, moves: Mapping[BlockId, BlockId], num_blocks: int) -> None:
        """Rename blocks; the pool of ``group`` has ``num_blocks`` from now on."""
        old = self._nodes[group]
        held = np.flatnonzero(old)
        nodes = old[held]
        names = np.array([moves.get(block, block) for block in held.tolist()], np.int32)
        self._nodes[group] = np.zeros(num_blocks + 1, np.int32)
        self._nodes[group][names] = nodes
        self._blocks[group][nodes] = names
        self._node_at[group] = view(self._nodes[group])

    # ---- rows ----------------------------------------------------------------------------------

    # A new row has no block; its other columns are whatever the last node there had.

    def _new_row(self) -> int:
        if self._num_spare:
            self._num_spare -= 1
            row: int = self._spare[self._num_spare]
            return row
        if self._top == len(self._parents):
            self._grow(1)
        self._top += 1
        return self._top - 1

    def _new_rows(self, count: int) -> BlockArray:
        """``count`` rows, ascending: with following numbers where that is possible."""
        spare = min(count, self._num_spare)
        fresh = count - spare
        if self._top + fresh > len(self._parents):
            self._grow(fresh)
        rows = np.empty(count, np.int32)
        rows[:spare] = self._columns["spare"][self._num_spare - spare : self._num_spare]
        rows[:spare].sort()
        rows[spare:] = range(self._top, self._top + fresh)
        self._num_spare -= spare
        self._top += fresh
        return rows

    def _free_row(self, row: int) -> None:
        self._spare[self._num_spare] = row
        self._num_spare += 1

    def _free_rows(self, rows: BlockArray) -> None:
        end = self._num_spare + len(rows)
        self._columns["spare"][self._num_spare : end] = rows
        self._num_spare = end

    def _grow(self, more: int) -> None:
        add = max(more, len(self._parents) // 2)
        for name, column in self._columns.items():
            self._columns[name] = np.concatenate([column, np.zeros(add, np.int32)])
        self._token_rows = np.concatenate([self._token_rows, np.zeros((add, self.block_size), np.int32)])
        self._blocks = [np.concatenate([column, np.zeros(add, np.int32)]) for column in self._blocks]
        self._see()
