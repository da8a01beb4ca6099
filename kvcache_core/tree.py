"""Nested inputs and outputs as a flat list of leaves and a shape to put them back into."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from kvcache_core.errors import InvalidType

__all__ = ["Constant", "Tree", "flatten"]

_CONSTANTS = (bool, int, float, complex, str, bytes, Enum, type(None), type)


@dataclass(frozen=True, slots=True)
class Constant:
    """A leaf that is no tensor: it is part of the shape."""

    value: Any


@dataclass(frozen=True, slots=True)
class Tree:
    """The shape of a nested value.

    Attributes:
        kind: the container's type; None for a tensor leaf, :class:`Constant` for a leaf that is no tensor.
        names: keys or field names, or the constant.
        children: one per name or item.
    """

    kind: type | None
    names: tuple[Any, ...] = ()
    children: tuple[Tree, ...] = ()

    def rebuild(self, leaves: Sequence[Any]) -> Any:
        """The nested value with these tensors."""
        return self._rebuild(iter(leaves))

    def _rebuild(self, leaves: Any) -> Any:
        if self.kind is None:
            return next(leaves)
        if self.kind is Constant:
            return self.names[0]
        values = [child._rebuild(leaves) for child in self.children]
        if not self.names:
            return self.kind(values)
        if issubclass(self.kind, dict) and not dataclasses.is_dataclass(self.kind):
            return self.kind(zip(self.names, values, strict=True))
        return self.kind(**dict(zip(self.names, values, strict=True)))

    def has_number(self) -> bool:
        """Whether one of its constants is a number, or yes or no."""
        if self.kind is Constant:
            return isinstance(self.names[0], bool | int | float | complex) and not isinstance(self.names[0], Enum)
        return any(child.has_number() for child in self.children)

    def encode(self) -> bytes:
        """Bytes that differ for different shapes and constants."""
        if self.kind is None:
            return b"T"
        kind = f"{self.kind.__module__}.{self.kind.__qualname__}"
        if self.kind is Constant:
            value = self.names[0]
            text = f"{type(value).__qualname__}:{value!r}".encode()
            return b"C%d:" % len(text) + text
        parts = [f"{kind}:{self.names!r}".encode(), *(child.encode() for child in self.children)]
        return b"N" + b"".join(b"%d:" % len(part) + part for part in parts)


_LEAF = Tree(None)


def flatten(value: Any, is_tensor: Callable[[Any], bool]) -> tuple[list[Any], Tree]:
    """Split a nested value (tuples, lists, named tuples, dicts, dataclasses) into its tensors and its shape.

    Raises:
        InvalidType: a part that is neither a container, a tensor nor a plain constant.

    Example:
        >>> leaves, tree = flatten({"a": [1.5, (2, None)]}, lambda value: isinstance(value, float))
        >>> leaves, tree.rebuild([3.5])
        ([1.5], {'a': [3.5, (2, None)]})
    """
    leaves: list[Any] = []
    return leaves, _flatten(value, is_tensor, leaves)


def _flatten(value: Any, is_tensor: Callable[[Any], bool], leaves: list[Any]) -> Tree:
    if is_tensor(value):
        leaves.append(value)
        return _LEAF
    if isinstance(value, _CONSTANTS):
        return Tree(Constant, (value,))
    kind: type = type(value)
    if isinstance(value, dict):
        named: Mapping[Any, Any] = value
    elif isinstance(value, Mapping):  # such as a tokenizer's result: what it is called besides does not matter
        kind, named = dict, value
    elif hasattr(value, "_fields"):
        named = value._asdict()
    elif isinstance(value, tuple | list):
        return Tree(kind, (), tuple(_flatten(item, is_tensor, leaves) for item in value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
    else:
        raise InvalidType(f"{_name(kind)} is neither a tensor, a container of tensors nor a plain value")
    names = tuple(named)
    if not names and not isinstance(value, dict):
        return Tree(kind, (), ())
    if any(not isinstance(name, _CONSTANTS) for name in names):
        raise InvalidType(f"the keys of a {_name(kind)} must be plain values")
    return Tree(kind, names, tuple(_flatten(named[name], is_tensor, leaves) for name in names))


def _name(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
