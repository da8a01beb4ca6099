"""Lower tiers: where evicted blocks go. What a tier is, the tier in RAM, and tiers by URL."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module

from kvcache_core.blockformat import Buffer
from kvcache_core.errors import InvalidInput, InvalidType
from kvcache_core.sizes import parse_memory
from kvcache_core.tierurl import without_password

__all__ = ["Item", "RamTier", "StoredItem", "Tier", "open_tier"]

Item = tuple[bytes, Buffer]
"""(key, value)."""


@dataclass(frozen=True, slots=True)
class StoredItem:
    """What :meth:`Tier.items` tells about one stored value.

    Attributes:
        key: its key.
        nbytes: bytes of the value.
        head: the first bytes of the value, enough for its header where there is one.
        hits: how often it was read, if the tier counts.
    """

    key: bytes
    nbytes: int
    head: Buffer
    hits: int | None = None


class Tier(ABC):
    """A place for values under keys, both opaque bytes. May lose values at any time, must not mix them up.

    A subclass needs :meth:`get_many` and :meth:`put_many`; the rest has defaults. Methods are called from several
    threads. Any exception is a counted miss for the caller, so a tier needs no error handling of its own.
    ``kvcache_core.testing.check_tier`` is the contract as a test.
    """

    name = "tier"
    """Names the tier in statistics and messages."""

    persistent = False
    """Whether values outlive the process."""

    read_only = False
    """Whether nothing is ever written to it."""

    exact_contains = False
    """Whether :meth:`contains` also says surely what is not there. Then a flush writes again what the tier has deleted
    to make room for the rest of it."""

    keep_displaced = False
    """Set by the cache when there is a tier below: then :meth:`put_many` should return what it drops for room."""

    @abstractmethod
    def get_many(self, keys: Sequence[bytes]) -> list[Buffer | None]:
        """The value of each key, or None."""

    @abstractmethod
    def put_many(self, items: Sequence[Item]) -> list[Item]:
        """Store values; returns those that were dropped for room, if they are worth handing to the next tier."""

    def peek(self, key: bytes) -> Buffer | None:
        """The value of a key, or None, for ``kvcache inspect``: where uses are counted or ordered, this is none."""
        return self.get_many([key])[0]

    def lease(self) -> AbstractContextManager[None]:
        """Inside, what :meth:`get_many` returns to this thread may be views that end with it: saves a copy."""
        return nullcontext()

    def contains(self, key: bytes) -> bool:
        """Whether the key is surely there, if that can be said at once and without waiting."""
        return False

    def delete_many(self, keys: Sequence[bytes]) -> int:
        """Forget values; returns how many there were."""
        raise NotImplementedError(f"{self.name} cannot delete")

    def items(self, head_bytes: int = 0) -> Iterator[StoredItem]:
        """What lies in the tier, for ``kvcache inspect``; with the first ``head_bytes`` of each value."""
        raise NotImplementedError(f"{self.name} cannot list what it holds")

    def nbytes(self) -> int | None:
        """Bytes held, if known."""
        return None

    def volatile_items(self) -> list[Item]:
        """What would be lost with the process and is worth copying to a tier that persists, most recent first."""
        return []

    def flush(self) -> None:  # noqa: B027 (nothing to wait for is a good default)
        """Wait until what was put survives what the tier is meant to survive."""

    def close(self) -> None:  # noqa: B027 (as is nothing to let go of)
        """Let go of files, connections and threads. May be called twice."""


class RamTier(Tier):
    """Values in this process's memory, least recently used first out.

    Args:
        max_bytes: budget for keys and values.

    Example:
        >>> tier = RamTier(100)
        >>> tier.put_many([(b"a", bytes(40)), (b"b", bytes(40))])
        []
        >>> [value is None for value in tier.get_many([b"a", b"x"])]
        [False, True]
        >>> [key for key, _ in tier.put_many([(b"c", bytes(40))])]
        [b'b']
    """

    exact_contains = True

    def __init__(self, max_bytes: int) -> None:
        self.name = "ram"
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._values: OrderedDict[bytes, Buffer] = OrderedDict()
        self._nbytes = 0

    def get_many(self, keys: Sequence[bytes]) -> list[Buffer | None]:
        """The value of each key, or None; the first key counts as the most recently used."""
        with self._lock:
            # A chain is asked for head first and must lose its tail first.
            for key in reversed(keys):
                if key in self._values:
                    self._values.move_to_end(key)
            return [self._values.get(key) for key in keys]

    def put_many(self, items: Sequence[Item]) -> list[Item]:
        """Store values; returns the least recently used ones that made room."""
        dropped: list[Item] = []
        with self._lock:
            for key, value in items:
                size = len(key) + len(value)
                if size > self.max_bytes:
                    dropped.append((key, value))
                    continue
                self._pop(key)
                while self._nbytes + size > self.max_bytes:
                    oldest, old = self._values.popitem(last=False)
                    self._nbytes -= len(oldest) + len(old)
                    dropped.append((oldest, old))
                self._values[key] = value
                self._nbytes += size
        return dropped

    def contains(self, key: bytes) -> bool:
        """Whether the key is there."""
        return key in self._values

    def delete_many(self, keys: Sequence[bytes]) -> int:
        """Forget values; returns how many there were."""
        with self._lock:
            return sum(self._pop(key) for key in keys)

    def items(self, head_bytes: int = 0) -> Iterator[StoredItem]:
        """What lies in the tier, least recently used first."""
        with self._lock:
            found = list(self._values.items())
        return (StoredItem(key, len(value), bytes(value[:head_bytes])) for key, value in found)

    def volatile_items(self) -> list[Item]:
        """Everything, most recently used first."""
        with self._lock:
            return list(reversed(self._values.items()))

    def nbytes(self) -> int:
        """Bytes of keys and values held."""
        return self._nbytes

    def close(self) -> None:
        """Forget everything."""
        with self._lock:
            self._values.clear()
            self._nbytes = 0

    def _pop(self, key: bytes) -> bool:
        old = self._values.pop(key, None)
        if old is None:
            return False
        self._nbytes -= len(key) + len(old)
        return True


_LEAST = 1000
"""Bytes of a RAM tier by URL: who asks for fewer has forgotten the unit."""

_OPTIONAL = {
    "file": ("kvcache_core.tier_file", "open_file_tier"),
    "disk": ("kvcache_core.tier_disk", "open_disk_tier"),
    "valkey": ("kvcache_core.tier_valkey", "open_valkey_tier"),
    "valkeys": ("kvcache_core.tier_valkey", "open_valkey_tier"),
    "redis": ("kvcache_core.tier_valkey", "open_valkey_tier"),
    "rediss": ("kvcache_core.tier_valkey", "open_valkey_tier"),
}


def open_tier(tier: str | Tier) -> Tier:
    """A tier from its URL: ``ram:4GiB``, ``disk:PATH?max=20GiB``, ``valkey://host:6379/0?ttl=86400``.

    Raises:
        InvalidInput: an unknown scheme, a missing or malformed size, or whatever the tier finds wrong.
        TierError: the tier cannot be reached or opened.
    """
    if isinstance(tier, Tier):
        return tier
    if not isinstance(tier, str):
        raise InvalidType(f"a tier is a URL or a kvcache_core.tiers.Tier, got {type(tier).__name__}")
    scheme, colon, rest = tier.partition(":")
    if scheme == "ram" and colon:
        if not rest:
            raise InvalidInput(f"tier {tier!r} needs its size: 'ram:4GiB'")
        try:
            size = parse_memory(rest)
        except InvalidInput as error:
            raise InvalidInput(f"tier {tier!r}: {error}; the form is 'ram:4GiB'") from None
        if size < _LEAST:
            raise InvalidInput(f"tier {tier!r}: {size} bytes hold no block; with a unit the form is 'ram:4GiB'")
        return RamTier(size)
    if not colon or scheme not in _OPTIONAL:
        known = "ram:SIZE, disk:PATH?max=SIZE, valkey://HOST:PORT/DB (or redis://, valkeys://, rediss://), file:PATH"
        raise InvalidInput(f"tier {without_password(tier)!r} has an unknown scheme; there are {known}")
    module, function = _OPTIONAL[scheme]
    opened = getattr(import_module(module), function)(tier)
    if not isinstance(opened, Tier):
        raise InvalidType(f"{module}.{function} returned {type(opened).__name__}")
    return opened
