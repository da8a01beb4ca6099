"""Time that passes only when it is looked at, for what measures itself."""

from __future__ import annotations

from types import ModuleType

import pytest

__all__ = ["Clock"]


class Clock:
    """Stands for the module ``time`` where calls are timed: a second passes at each reading, and what a test adds.

    Args:
        monkeypatch: puts the real one back when the test ends.
        modules: those that time calls.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
        self.now = 0.0
        for module in modules:
            monkeypatch.setattr(module, "time", self)

    def perf_counter(self) -> float:
        """The seconds that have passed."""
        self.now += 1
        return self.now
