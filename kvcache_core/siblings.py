"""The children of one node, sorted: cheap to add to and to take from, however many there are."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from itertools import chain, islice

__all__ = ["Siblings"]

_PART = 256
"""Nodes in half a part: a part that reaches twice as many is cut in two."""


class _Part:
    """Some of the nodes, and the first token of each: the search looks at whole keys only where those are equal."""

    __slots__ = ("firsts", "nodes")

    def __init__(self, nodes: list[int], firsts: array[int]) -> None:
        self.nodes = nodes
        self.firsts = firsts


class Siblings:
    """Nodes sorted by their tokens, in parts of a few hundred: adding one to a million moves only those of one part.

    The first token counts as a number, the others as their bytes.

    Invariants:
        - all parts together are sorted.
        - no part is empty, and none reaches ``2 * _PART`` nodes.

    Args:
        key: a node's tokens as little-endian int32 bytes, which never change while it is in here.
        node: the first one.
    """

    __slots__ = ("_key", "_parts")

    def __init__(self, key: Callable[[int], bytes], node: int) -> None:
        self._key = key
        self._parts = [_Part([node], array("i", key(node)[:4]))]

    def __iter__(self) -> Iterator[int]:
        """The children, in the order of their tokens."""
        return chain.from_iterable(part.nodes for part in self._parts)

    def only(self) -> int:
        """The node, if there is just one; else 0."""
        nodes = self._parts[0].nodes
        return nodes[0] if len(self._parts) == len(nodes) == 1 else 0

    def add(self, node: int) -> None:
        """Put a node in its place, before those with the same tokens."""
        tokens = self._key(node)
        number, at = self._find(tokens)
        part = self._parts[number]
        part.nodes.insert(at, node)
        part.firsts.insert(at, _first(tokens))
        if len(part.nodes) == 2 * _PART:
            halves = [_Part(part.nodes[cut], part.firsts[cut]) for cut in (slice(_PART), slice(_PART, None))]
            self._parts[number : number + 1] = halves

    def remove(self, node: int) -> None:
        """Take a node out; another one has to stay."""
        number, at = self._find(self._key(node))
        # Equal tokens may stand side by side, with other extra keys: also in the next parts.
        while node not in self._parts[number].nodes[at : at + 1]:
            number, at = (number, at + 1) if at < len(self._parts[number].nodes) else (number + 1, 0)
        part = self._parts[number]
        del part.nodes[at], part.firsts[at]
        if not part.nodes:
            del self._parts[number]

    def from_(self, tokens: bytes) -> Iterator[int]:
        """The nodes that do not come before ``tokens``, in order."""
        return self._from(*self._find(tokens))

    def around(self, tokens: bytes) -> tuple[Iterator[int], Iterator[int]]:
        """The nodes that come before ``tokens``, nearest first, and those that do not, in order."""
        number, at = self._find(tokens)
        return self._before(number, at), self._from(number, at)

    def check_valid(self) -> None:
        """Assert every invariant of the class docstring; expensive, for tests."""
        keys = [self._key(node) for node in self]
        assert keys == sorted(keys, key=lambda tokens: (_first(tokens), tokens))
        assert [*map(_first, keys)] == [*chain.from_iterable(part.firsts for part in self._parts)]
        assert all(0 < len(part.nodes) < 2 * _PART for part in self._parts)

    def _from(self, number: int, at: int) -> Iterator[int]:
        yield from islice(self._parts[number].nodes, at, None)
        for part in self._parts[number + 1 :]:
            yield from part.nodes

    def _before(self, number: int, at: int) -> Iterator[int]:
        yield from map(self._parts[number].nodes.__getitem__, range(at - 1, -1, -1))
        for part in reversed(self._parts[:number]):
            yield from reversed(part.nodes)

    def _find(self, tokens: bytes) -> tuple[int, int]:
        """(part, place in it) where ``tokens`` would stand; the place may be the end of the last part."""
        first, key = _first(tokens), self._key
        number = self._part(first, tokens) if len(self._parts) > 1 else 0
        part = self._parts[number]
        low = bisect_left(part.firsts, first)
        high = bisect_right(part.firsts, first, low)
        return number, low if low == high else bisect_left(part.nodes, tokens, low, high, key=key)

    def _part(self, first: int, tokens: bytes) -> int:
        """The part that ``tokens`` belong in: the first one whose last node does not come before them."""
        parts, key = self._parts, self._key
        low = bisect_left(parts, first, hi=len(parts) - 1, key=_last_first)
        high = bisect_right(parts, first, low, len(parts) - 1, key=_last_first)
        return low if low == high else bisect_left(parts, tokens, low, high, key=lambda part: key(part.nodes[-1]))


def _first(tokens: bytes) -> int:
    return int.from_bytes(tokens[:4], "little")


def _last_first(part: _Part) -> int:
    return part.firsts[-1]
