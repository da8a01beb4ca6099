"""Stores whose allocator has no memory left."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock


@contextmanager
def no_memory(store: Any, at: int = 0) -> Iterator[None]:
    """From the ``at``-th array on that this store allocates now, there is no memory, as its framework says it."""
    torch = hasattr(store, "device")
    allocate, count = store._new, itertools.count()

    def allocate_some(*args: Any) -> Any:
        if next(count) >= at:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory") if torch else MemoryError
        return allocate(*args)

    with mock.patch.object(store, "_new", allocate_some):
        yield
