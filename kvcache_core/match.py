"""Prefix match: the longest head of a prompt that every layer group can serve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kvcache_core.keys import block_extras
from kvcache_core.pool import BlockPool
from kvcache_core.prefix import PrefixIndex
from kvcache_core.types import BlockArray, TokenArray

__all__ = ["LayerGroup", "PrefixMatch", "first_visible_block", "match_prefix"]


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that share one block table: same kind, same window. Each group has its own block ids."""

    kind: str
    window: int | None
    pool: BlockPool


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """A matched head: its nodes, block tables (one per group), dropped block counts and token count."""

    nodes: list[int]
    tables: list[list[int]]
    dropped: list[int]
    num_tokens: int


def first_visible_block(position: int, window: int | None, block_size: int) -> int:
    """Index of the first block that a token at ``position`` or later can still see.

    Example:
        >>> first_visible_block(100, None, 16), first_visible_block(100, 32, 16), first_visible_block(5, 32, 16)
        (0, 4, 0)
    """
    return 0 if window is None else max(0, position - window + 1) // block_size


def match_prefix(
    index: PrefixIndex,
    groups: Sequence[LayerGroup],
    root: int,
    tokens: TokenArray,
    extra_keys: Mapping[int, bytes],
) -> PrefixMatch:
    """The longest cached head of ``tokens``, never all of them: the last token is always computed.

    Full-attention groups need every block of the head; a window group needs only its last window, a state
    group the state behind the head's last token. The shortest answer wins. Behind the full blocks the child
    that shares the longest head with the rest is added as a partial block; it is copied before it is written.
    """
    size = index.block_size
    limit = len(tokens) - 1
    nodes = index.walk(root, tokens, limit // size, extra_keys) if limit >= size else []
    held = [index.blocks(number, nodes) for number in range(len(groups))]
    count = _agree(groups, held, len(nodes), size)
    del nodes[count:]
    partial = _best_head(index, groups, nodes[-1] if nodes else root, tokens, count, limit, extra_keys)
    num_tokens = count * size + (partial[0] if partial else 0)
    tables, dropped = [], []
    for number, group in enumerate(groups):
        first = min(first_visible_block(num_tokens, group.window, size), count)
        table = held[number][:count].tolist()
        table[:first] = [0] * first
        if partial:
            table.append(index.block(number, partial[1]))
        tables.append(table)
        dropped.append(first)
    if partial:
        nodes.append(partial[1])
    return PrefixMatch(nodes, tables, dropped, num_tokens)


def _agree(groups: Sequence[LayerGroup], held: Sequence[BlockArray], count: int, size: int) -> int:
    """How many leading nodes all groups can serve: shrink until nobody objects."""
    while True:
        before = count
        for group, blocks in zip(groups, held, strict=True):
            if np.count_nonzero(blocks) < len(blocks):
                count = _longest_hit(group.window, blocks, count, size)
        if count == before:
            return count


def _longest_hit(window: int | None, blocks: BlockArray, count: int, size: int) -> int:
    """The longest head of at most ``count`` blocks that a group can serve from ``blocks`` (null where it has none)."""
    if window is None:
        missing = blocks[:count] == 0
        return int(missing.argmax()) if missing.any() else count
    while count:
        first = first_visible_block(count * size, window, size)
        gaps = np.flatnonzero(blocks[first:count] == 0)
        if not gaps.size:
            return count
        # Every shorter head that ends behind the last missing block needs that block too.
        count = first + int(gaps[-1])
    return 0


def _best_head(
    index: PrefixIndex,
    groups: Sequence[LayerGroup],
    parent: int,
    tokens: TokenArray,
    count: int,
    limit: int,
    extra_keys: Mapping[int, bytes],
) -> tuple[int, int] | None:
    start = count * index.block_size
    rest = tokens[start : min(start + index.block_size, limit)]
    if not len(rest) or not parent:
        return None
    extras = block_extras(extra_keys, count, index.block_size) if extra_keys else {}
    has_states = any(group.kind == "state" for group in groups)
    for shared, node in index.heads(parent, rest, extras):
        if has_states and shared < index.fill(node):
            continue  # its state is behind tokens that this prompt has not
        if all(index.block(number, node) for number in range(len(groups))):
            return shared, node
    return None
