"""Every error the library raises, in one tree.

A message says the rule, what was needed, what is there and what to do next.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "BlockError",
    "BlockRefused",
    "CacheFull",
    "InvalidInput",
    "InvalidType",
    "KVCacheError",
    "KVCacheWarning",
    "OutOfMemory",
    "PartlyFailed",
    "SequenceClosed",
    "StaleSequence",
    "StepError",
    "TierError",
    "UsageError",
]


class KVCacheError(Exception):
    """Base of every error of this library."""


class CacheFull(KVCacheError):
    """The pool has no room for a step. Raised before anything was changed.

    Attributes:
        needed: blocks the step needs.
        available: blocks that are free or can be evicted.
        capacity: blocks in the pool.
    """

    def __init__(self, message: str, *, needed: int, available: int, capacity: int) -> None:
        super().__init__(message)
        self.needed = needed
        self.available = available
        self.capacity = capacity


class OutOfMemory(KVCacheError, MemoryError):
    """There is no memory for arrays of another capacity, or for what moves; nothing was changed."""


class InvalidInput(KVCacheError, ValueError):
    """A value the caller passed in breaks a rule; nothing was changed."""


class InvalidType(InvalidInput, TypeError):
    """A value has the wrong type or dtype; nothing was changed."""


class BlockError(KVCacheError, ValueError):
    """A block id is unknown, was released twice, or is used after it was freed."""


class BlockRefused(KVCacheError, ValueError):
    """A stored block is damaged, foreign or of another version: reading it is a miss.

    Attributes:
        reason: ``"size"``, ``"foreign"``, ``"key"`` or ``"checksum"``.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"stored block refused ({reason}): {message}")
        self.reason = reason


class TierError(KVCacheError, RuntimeError):
    """A tier cannot be set up, or did not answer. Later than at construction it is counted as a miss."""


class PartlyFailed(TierError):
    """A tier did a part of what it was asked for.

    Attributes:
        keys: of the values that it did not store; empty where it was asked what lies there, and listed a part.
    """

    def __init__(self, message: str, keys: Iterable[bytes] = ()) -> None:
        super().__init__(message)
        self.keys = frozenset(keys)


class SequenceClosed(KVCacheError, RuntimeError):
    """A closed sequence was stepped, forked, truncated or closed again."""


class StepError(KVCacheError, RuntimeError):
    """A step was used out of order: committed twice, or a sequence was put into two steps."""


class StaleSequence(StepError):
    """The weights (the namespace) changed while a sequence was open: its past no longer fits the model."""


class UsageError(KVCacheError, RuntimeError):
    """A cache was used in a way it cannot serve: unattached, nested, or attached twice."""


class KVCacheWarning(UserWarning):
    """Something works, but not as cached as the caller may expect."""
