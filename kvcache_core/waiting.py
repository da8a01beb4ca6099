"""Waiting for something that may hang, up to a time limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

__all__ = ["within"]

_T = TypeVar("_T")


def within(deadline: float | None, run: Callable[[], _T]) -> _T:
    """What ``run`` returns or raises, if it does so before ``deadline`` (``time.monotonic()``; None: whenever it does).

    Raises:
        TimeoutError: it did not. It goes on in a thread of its own, since nothing can stop it.

    Example:
        >>> within(time.monotonic() + 5, lambda: "done")
        'done'
    """
    if deadline is None:
        return run()
    result: Future[_T] = Future()

    def work() -> None:
        try:
            result.set_result(run())
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=work, name="kvcache-waiting", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the interpreter ends, which lets no thread begin
        return run()
    thread.join(max(0.0, deadline - time.monotonic()))
    if thread.is_alive():
        raise TimeoutError("it took longer than there was time for")
    return result.result()
