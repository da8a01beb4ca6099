"""Whether a cache in front of a module costs more than it saves."""

from __future__ import annotations

from kvcache_core.errors import InvalidInput

__all__ = ["BYPASS", "Worth", "check_bypass"]

BYPASS = ("never", "auto")
"""Whether a module whose cache does not pay is computed without it."""

_FIRST_LOOK = 32
"""Calls before the first decision."""
_LATER_LOOK = 8
_FIRST_PAUSE = 2048
"""Calls without the cache behind a decision against it; doubled each time, so that looking again costs ever less."""
_LONGEST_PAUSE = 1 << 20


def check_bypass(bypass: str) -> str:
    """Raise InvalidInput unless ``bypass`` is one of :data:`BYPASS`."""
    if bypass not in BYPASS:
        raise InvalidInput(f"bypass must be one of {BYPASS}, got {bypass!r}")
    return bypass


class Worth:
    """Seconds saved and spent by one module's cache, and with ``auto`` the decision to leave it out for a while.

    A call saves what computing all of its samples would have taken, less what computing the missing ones took. The
    former is known from calls that computed whole batches; the first of them is forgotten when there is a second,
    because a first run loads and allocates.

    Args:
        auto: leave the cache out while it costs more than it saves.

    Attributes:
        saved, spent: seconds, over all calls.
        skip: so many calls go without the cache from now on.
        skipped: so many did.
    """

    def __init__(self, *, auto: bool) -> None:
        self.auto = auto
        self.saved = self.spent = 0.0
        self.skip = self.skipped = 0
        self._row_seconds = 0.0
        self._measured = 0
        self._look = _FIRST_LOOK
        self._calls = 0
        self._balance = 0.0
        self._pause = _FIRST_PAUSE

    @property
    def row_seconds(self) -> float:
        """What computing one sample takes."""
        return self._row_seconds

    @property
    def wants_measure(self) -> bool:
        """Whether the next call should be timed without the cache, too, before a decision."""
        return self.auto and self._calls == self._look // 2

    def measured(self, rows: int, seconds: float) -> None:
        """A whole batch of ``rows`` was computed."""
        self._measured += 1
        now = seconds / rows
        self._row_seconds = now if self._measured <= 2 else 0.8 * self._row_seconds + 0.2 * now

    def looked(self, seconds: float) -> None:
        """The look at the weights before a call took so long."""
        self.spent += seconds
        self._balance -= seconds

    def proved(self, seconds: float) -> None:
        """Seeing that the module can be cached took so long, once: no reason to leave the cache out."""
        self.spent += seconds

    def called(self, rows: int, computing: float, spent: float) -> None:
        """A call of ``rows`` samples took ``computing`` seconds for the missing ones and ``spent`` for the cache."""
        saved = rows * self._row_seconds - computing
        self.saved += saved
        self.spent += spent
        self._calls += 1
        self._balance += saved - spent
        if self.auto and self._calls >= self._look:
            if self._balance < 0:
                self.skip = self._pause
                self._pause = min(2 * self._pause, _LONGEST_PAUSE)
                self._look = _LATER_LOOK
            else:
                self._pause, self._look = _FIRST_PAUSE, _FIRST_LOOK
            self._calls, self._balance = 0, 0.0
