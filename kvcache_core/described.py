"""What a value says, as text that any process makes alike: what a module does apart from its weights."""

from __future__ import annotations

import os
import types
import warnings
from collections.abc import Callable, Mapping
from enum import Enum
from hashlib import blake2b
from typing import Any

from kvcache_core.errors import KVCacheWarning

__all__ = ["ModuleIdentity", "Unclear", "add_text", "describe"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), Enum)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, type)


class Unclear(Exception):
    """A value says nothing that holds in another process: a closure, a lambda, an open file."""


def describe(value: Any, known: tuple[type, ...] = (), inside: frozenset[int] = frozenset()) -> str:
    """A text that differs for values that differ.

    Args:
        value: plain values, containers and objects of them, functions and classes with a name of their own.
        known: types whose ``repr`` says all.
        inside: the containers on the way to it.

    Raises:
        Unclear: there is no such text.

    Example:
        >>> describe({"b": (1, 2.0), "a": int})
        '{a:builtins.int,b:(1,2.0,)}'
    """
    if isinstance(value, _PLAIN + known):
        return repr(value)
    if isinstance(value, _FUNCTIONS):
        name = f"{value.__module__}.{value.__qualname__}"
        if "<" in name or getattr(value, "__closure__", None):
            raise Unclear(f"the function {name} has no name of its own")
        return name
    if id(value) in inside:
        raise Unclear("it holds itself")
    inside |= {id(value)}
    if isinstance(value, Mapping):
        parts = sorted((str(key), describe(one, known, inside)) for key, one in value.items())
        return "{" + ",".join(f"{key}:{one}" for key, one in parts) + "}"
    if isinstance(value, (list, tuple)):
        return "(" + "".join(f"{describe(one, known, inside)}," for one in value) + ")"
    if isinstance(value, (set, frozenset)):
        return "{" + ",".join(sorted(describe(one, known, inside) for one in value)) + "}"
    if callable(value) or not hasattr(value, "__dict__"):
        raise Unclear(f"a {type(value).__qualname__} may do anything")
    return f"{describe(type(value))}{describe(vars(value), known, inside)}"


def add_text(digest: Any, text: str) -> None:
    """Update a ``hashlib`` digest with a text and its length: what follows cannot be taken for its end."""
    data = text.encode()
    digest.update(len(data).to_bytes(8, "little") + data)


class ModuleIdentity:
    """What stands for a module and its weights in any process; made again only after a change was noticed.

    Args:
        name: given by the caller instead; weights that changed since are nobody's but this process's.
        what: the module, for a warning.
    """

    def __init__(self, name: str | None, what: str) -> None:
        self._name = name
        self._what = what
        self._first: bytes | None = None
        self._known: tuple[bytes, bytes | None] | None = None

    def of(self, mark: bytes, digest: Callable[[], bytes]) -> bytes | None:
        """16 bytes, or None with one warning if the module's results have to stay in this process.

        Args:
            mark: changes when the weights do.
            digest: what a module is without a name; raises Unclear.
        """
        self._first = mark if self._first is None else self._first
        if self._known is None or self._known[0] != mark:
            self._known = mark, self._made(mark, digest)
        return self._known[1]

    def _made(self, mark: bytes, digest: Callable[[], bytes]) -> bytes | None:
        if self._name is not None:
            changed = b"" if mark == self._first else os.urandom(16)
            named = self._name.encode() + b"\0" + changed
            return blake2b(named, digest_size=16, person=b"kvcache-name").digest()
        try:
            return digest()
        except Unclear as unclear:
            warnings.warn(
                f"results of {self._what} stay out of the tiers: what it does cannot be told from another ({unclear}); "
                "name it, attach(module, identity='name@version')",
                KVCacheWarning,
                stacklevel=2,
            )
            return None
