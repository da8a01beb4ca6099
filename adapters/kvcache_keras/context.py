"""Which cache and which step this thread is in."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tensorflow.python import pywrap_tfe
from tensorflow.python.eager import record

__all__ = ["local", "not_recording", "outside", "recording", "stepping"]


class _Local(threading.local):
    """One thread's state. A graph reads it only while it is traced, in the thread that traces it: what changes
    from step to step is in tensors.
    """

    cache: Any = None
    """The cache whose ``with`` block the thread is in."""
    step: Any = None
    """The step (or recording) that the model is being run or traced for."""

    samples: bytes | None = None
    """The digest of the weights' samples, where a graph has taken them already."""
    mode: bytes = b""
    """What layers were switched to when that graph was traced."""


local = _Local()


def recording() -> bool:
    """Whether a ``GradientTape`` records what this thread does."""
    return bool(record.could_possibly_record()) and not pywrap_tfe.TFE_Py_TapeSetIsStopped()


def not_recording() -> Any:
    """A context in which no ``GradientTape`` records."""
    return record.stop_recording()


@contextmanager
def stepping(step: Any) -> Iterator[None]:
    """Route ``attention`` and ``positions`` of this thread to ``step``."""
    before, local.step = local.step, step
    try:
        yield
    finally:
        local.step = before


@contextmanager
def outside() -> Iterator[None]:
    """Let models of this thread run as outside any cache."""
    before = local.cache, local.step
    local.cache = local.step = None
    try:
        yield
    finally:
        local.cache, local.step = before
