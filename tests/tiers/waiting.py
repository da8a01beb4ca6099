"""Wait for what another thread, process or server does in its own time."""

from __future__ import annotations

import time
from collections.abc import Callable


def eventually(true: Callable[[], object], what: str = "it never came true", seconds: float = 60) -> None:
    """Return once `true()` is; fail with `what` after so many `seconds`."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)
