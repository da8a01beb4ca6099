"""``model(x)`` inside ``with cache:`` in a user's own graph.

The graph is traced once and runs many times, so what is cached is decided while it runs: one host call plans and one
commits. When the graph raises in between, nobody tells the host: a plan whose run has ended is found by looking whether
the Python frame that ran it is still on some thread's stack, and rolled back by the next call.
"""

from __future__ import annotations

import itertools
import sys
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from kvcache_core.errors import StepError

__all__ = ["PendingCalls"]

_RUNNERS = ("execute.py", "iterator_ops.py", "session.py")


@dataclass(slots=True)
class _Pending:
    call: AbstractContextManager[Any]
    frames: list[FrameType]


class PendingCalls:
    """Calls that were planned inside a running graph and not committed yet."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: dict[int, _Pending] = {}
        self._numbers = itertools.count(1)

    def add(self, call: AbstractContextManager[Any]) -> int:
        """Keep an entered call; returns its number."""
        with self._lock:
            number = next(self._numbers)
            self._pending[number] = _Pending(call, _running_graphs())
        return number

    def finish(self, number: int) -> None:
        """Commit a call."""
        with self._lock:
            pending = self._pending.pop(number, None)
        if pending is None:
            raise StepError("this graph's step was rolled back while it ran; call it again")
        pending.call.__exit__(None, None, None)

    def roll_back_stale(self) -> int:
        """Roll back the calls whose graph has ended without committing; returns how many."""
        if not self._pending:
            return 0
        running = {id(frame) for frame in _running_graphs()}
        with self._lock:
            stale = [
                number
                for number, pending in self._pending.items()
                # A graph that no Python frame ran (a data pipeline's thread) may be running still.
                if pending.frames and not any(id(frame) in running for frame in pending.frames)
            ]
            calls = [self._pending.pop(number).call for number in stale]
        for call in calls:
            error = StepError("the graph that planned this step ended without committing it")
            try:
                call.__exit__(StepError, error, None)
            except StepError as raised:
                if raised is not error:
                    raise
        return len(calls)


def _running_graphs() -> list[FrameType]:
    """The frames, one per thread, that are running a TensorFlow graph now."""
    found = []
    for frame in sys._current_frames().values():
        walk: FrameType | None = frame
        while walk is not None:
            if walk.f_code.co_filename.endswith(_RUNNERS) and "tensorflow" in walk.f_code.co_filename:
                found.append(walk)
            walk = walk.f_back
    return found
