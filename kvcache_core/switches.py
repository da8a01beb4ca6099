"""What a model's parts are switched to: names and yes or no among their attributes, such as which adapter is active."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

__all__ = ["Switches"]

_PLAIN = (str, bool, type(None))
_LISTS = (list, tuple, set, frozenset)


class Switches:
    """Notices that a part of a model was switched, which changes what it computes and none of its weights.

    Looked at are attributes that were a ``str``, a ``bool``, None, a list of names or a dictionary of such and numbers
    when this was made. Numbers by themselves are left out: many a part counts its calls.

    Args:
        parts: the attributes of each part, as they change.
        ignored: names of attributes that say nothing about what is computed.

    Example:
        >>> lora = {"active": "a", "calls": 3}
        >>> switches = Switches([lora])
        >>> switches.mode()
        b''
        >>> lora["active"], lora["calls"] = "b", 4
        >>> switches.mode()
        b"['b']"
    """

    def __init__(self, parts: Iterable[Mapping[str, Any]], ignored: Collection[str] = ()) -> None:
        self._places = [
            (part, name)
            for part in parts
            for name, value in part.items()
            if name not in ignored and (value is None or _state_of(value) is not None)
        ]
        self._first = self._read()

    @property
    def first(self) -> bytes:
        """Bytes that stand for how all was switched when this was made."""
        return repr(self._first).encode()

    def mode(self) -> bytes:
        """Bytes that stand for how all is switched now; empty if that is as it was when this was made."""
        now = self._read()
        return b"" if now == self._first else repr(now).encode()

    def _read(self) -> list[Any]:
        return [
            value if isinstance(value := part.get(name), _PLAIN) else _state_of(value) for part, name in self._places
        ]


def _state_of(value: Any) -> Any:
    """The value as it is now, or None for anything that is no switch."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, _LISTS) and all(isinstance(each, str) for each in value):
        return tuple(sorted(value)) if isinstance(value, (set, frozenset)) else tuple(value)
    if isinstance(value, dict) and all(isinstance(each, (*_PLAIN, int, float)) for each in value.values()):
        return tuple((str(key), each) for key, each in value.items())
    return None
