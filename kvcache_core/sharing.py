"""What the kinds of content of one cache share: a lock, the order of uses, and a limit in bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["LimitOf", "SharedLimit", "UseClock", "no_limit"]


class UseClock:
    """One lock and one order of uses for all the pools of a cache: each block released in any of them has its own time.

    Attributes:
        now: the time of the last release, 0 before the first.
        lock: held by whoever touches a pool.
    """

    def __init__(self) -> None:
        self.now = 0
        self.lock = threading.RLock()

    def tick(self, count: int) -> NDArray[np.int64]:
        """The times of ``count`` blocks that are released now, one behind the other."""
        self.now += count
        return np.arange(self.now - count + 1, self.now + 1, dtype=np.int64)


class SharedLimit(Protocol):
    """Who is asked, under the lock and before anything is changed, when one kind is short of room."""

    @property
    def more_blocks(self) -> int:
        """Blocks that the other kind could give up at most."""

    def could_hold(self, size: int, rest: int) -> bool:
        """Whether an entry of ``size`` bytes can have room now, whatever goes for it; ``rest`` bytes come behind it."""

    def settle(self) -> None:
        """A step begins, or nobody reads any more: what could not move before may move now."""

    def blocks_short(self, least: Sequence[int], wanted: Sequence[int]) -> None:
        """A step takes ``least`` blocks of each layer group, better ``wanted``: see whether there should be more."""

    def bytes_short(self, size: int, rest: int) -> None:
        """An entry of ``size`` bytes does not fit unless the oldest one goes: see whether something else should go.
        Others, of ``rest`` bytes together, come behind it.
        """


LimitOf = Callable[[], "SharedLimit | None"]
"""Gives the limit that is shared with another kind; None if there is none (any more)."""


def no_limit() -> SharedLimit | None:
    """No limit is shared."""
    return None
