"""The children of one node, sorted: cheap to add to and to take from, however many there are."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import chain, islice

__all__ = ["Siblings"]

_PART = 256
"""Nodes in half a part: a part that reaches twice as many is cut in two."""


class Siblings:
    """Nodes sorted by their tokens, in parts of a few hundred: adding one to a million moves only those of one part.

    Invariants:
        - all parts together are sorted.
        - no part is empty, and none reaches ``2 * _PART`` nodes.

    Args:
        key: a node's tokens as bytes, which never change while it is in here.
        node: the first one.
    """

    __slots__ = ("_key", "_parts")

    def __init__(self, key: Callable[[int], bytes], node: int) -> None:
        self._key = key
        self._parts = [[node]]

    def __iter__(self) -> Iterator[int]:
        """The children, in the order of their tokens."""
        return chain.from_iterable(self._parts)

    def only(self) -> int:
        """The node, if there is just one; else 0."""
        return self._parts[0][0] if len(self._parts) == len(self._parts[0]) == 1 else 0

    def add(self, node: int) -> None:
        """Put a node in its place, before those with the same tokens."""
        number, at = self._find(self._key(node))
        part = self._parts[number]
        part.insert(at, node)
        if len(part) == 2 * _PART:
            self._parts[number : number + 1] = [part[:_PART], part[_PART:]]

    def remove(self, node: int) -> None:
        """Take a node out; another one has to stay."""
        number, at = self._find(self._key(node))
        # Equal tokens may stand side by side, with other extra keys: also in the next parts.
        while node not in self._parts[number][at : at + 1]:
            number, at = (number, at + 1) if at < len(self._parts[number]) else (number + 1, 0)
        del self._parts[number][at]
        if not self._parts[number]:
            del self._parts[number]

    def from_(self, tokens: bytes) -> Iterator[int]:
        """The nodes that do not come before ``tokens``, in order."""
        number, at = self._find(tokens)
        yield from islice(self._parts[number], at, None)
        for part in self._parts[number + 1 :]:
            yield from part

    def before(self, tokens: bytes) -> Iterator[int]:
        """The nodes that come before ``tokens``, nearest first."""
        number, at = self._find(tokens)
        part = self._parts[number]
        yield from map(part.__getitem__, range(at - 1, -1, -1))
        for part in reversed(self._parts[:number]):
            yield from reversed(part)

    def check_valid(self) -> None:
        """Assert every invariant of the class docstring; expensive, for tests."""
        assert [*self] == sorted(self, key=self._key)
        assert all(0 < len(part) < 2 * _PART for part in self._parts)

    def _find(self, tokens: bytes) -> tuple[int, int]:
        """(part, place in it) where ``tokens`` would stand; the place may be the end of the last part."""
        parts, number = self._parts, 0
        if len(parts) > 1:
            number = bisect_left(parts, tokens, hi=len(parts) - 1, key=lambda part: self._key(part[-1]))
        return number, bisect_left(parts[number], tokens, key=self._key)
