"""One result of a module for one sample, and what a call finds of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

__all__ = ["Below", "Entry", "EntryLookup"]


class Entry(NamedTuple):
    """One result that is kept. A tuple: it is made in half the time of a dataclass.

    Attributes:
        key: its content key.
        payload: what was computed; opaque here.
        nbytes: its size.
        form: what it looks like in a tier; None for one that stays in this process. Opaque here.
    """

    key: bytes
    payload: Any
    nbytes: int
    form: Any = None


class Below(Protocol):
    """The tiers under the entries."""

    def find(self, form: Any, keys: Sequence[bytes]) -> Iterable[Entry]:
        """The results among ``keys`` that lie there."""

    def kept(self, entry: Entry) -> None:
        """A result was computed and is kept. Must not raise."""

    def demote(self, entry: Entry) -> None:
        """A result is evicted. Must not raise."""


@dataclass(frozen=True, slots=True)
class EntryLookup:
    """What is there for the B samples of a call.

    Attributes:
        keys: B keys.
        found: B payloads; None where there is none.
        compute: the samples to compute: the first of each key that was not found.
        sources: {sample: index into ``compute``} for every sample that was not found.
    """

    keys: Sequence[bytes]
    found: list[Any]
    compute: list[int]
    sources: dict[int, int]

    @property
    def hits(self) -> int:
        """Samples that need no computing: found, or equal to another one of the call."""
        return len(self.keys) - len(self.compute)
