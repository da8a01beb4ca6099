"""Prefix match: the longest head of a prompt that every layer group can serve."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvcache_core.pool import BlockPool
from kvcache_core.prefix import PrefixIndex

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
    tokens: array[int],
    keys: Sequence[bytes],
    extra_keys: Mapping[int, bytes],
) -> PrefixMatch:
    """The longest cached head of ``tokens``, never all of them: the last token is always computed.

    Full-attention groups need every block of the head; a window group needs only its last window. The
    shortest answer wins. Behind the full blocks the child that shares the longest head with the rest is
    added as a partial block; it is copied before it is written.
    """
    size = index.block_size
    limit = len(tokens) - 1
    nodes: list[int] = []
    for key in keys[: limit // size]:
        node = index.find(key)
        if node is None:
            break
        nodes.append(node)
    count = _agree(index, groups, nodes)
    del nodes[count:]
    partial = _best_head(index, groups, nodes[-1] if nodes else root, tokens, count, limit, extra_keys)
    num_tokens = count * size
    if partial:
        num_tokens += partial[0]
        nodes.append(partial[1])
    tables, dropped = [], []
    for number, group in enumerate(groups):
        first = min(first_visible_block(num_tokens, group.window, size), len(nodes))
        if partial:
            first = min(first, count)
        tables.append([0] * first + [int(index.block(number, node)) for node in nodes[first:]])
        dropped.append(first)
    return PrefixMatch(nodes, tables, dropped, num_tokens)


def _agree(index: PrefixIndex, groups: Sequence[LayerGroup], nodes: Sequence[int]) -> int:
    """How many leading nodes all groups can serve: shrink until nobody objects."""
    count = len(nodes)
    while True:
        before = count
        for number, group in enumerate(groups):
            count = _longest_hit(index, number, group.window, nodes, count)
        if count == before:
            return count


def _longest_hit(index: PrefixIndex, number: int, window: int | None, nodes: Sequence[int], count: int) -> int:
    if window is None:
        for at in range(count):
            if not index.block(number, nodes[at]):
                return at
        return count
    while count:
        first = first_visible_block(count * index.block_size, window, index.block_size)
        missing = next((at for at in range(count - 1, first - 1, -1) if not index.block(number, nodes[at])), None)
        if missing is None:
            return count
        # Every shorter head that ends behind the missing block needs that block too.
        count = missing
    return 0


def _best_head(
    index: PrefixIndex,
    groups: Sequence[LayerGroup],
    parent: int,
    tokens: array[int],
    count: int,
    limit: int,
    extra_keys: Mapping[int, bytes],
) -> tuple[int, int] | None:
    start = count * index.block_size
    rest = tokens[start : min(start + index.block_size, limit)]
    if not rest:
        return None
    extras = index.block_extras(extra_keys, count) if extra_keys else {}
    for shared, node in index.heads(parent, rest, extras):
        if all(index.block(number, node) for number in range(len(groups))):
            return shared, node
    return None
