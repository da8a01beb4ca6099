"""The way down: a bounded queue and one writer thread, so that a step never waits for a tier."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvcache_core.blockformat import Buffer
from kvcache_core.errors import PartlyFailed
from kvcache_core.tiers import Item, Tier

__all__ = ["DemotionQueue", "Pending"]

_BATCH_BYTES = 32 << 20
"""Bytes that are written at once: few enough that flush and close see progress."""


@dataclass(frozen=True, slots=True)
class Pending:
    """A result on its way down.

    Attributes:
        payload: what reading its value would give; None while it is only noted and still lies in the pool.
        nbytes: its bytes.
        encode: gives the value to write, for the time in seconds since 1970; None if it is gone meanwhile.
        through: goes to every tier that outlives the process, instead of to the first tier.
    """

    payload: Any
    nbytes: int
    encode: Callable[[int], Buffer | None]
    through: bool = False

    @property
    def held(self) -> int:
        """Bytes that it keeps in memory."""
        return 0 if self.payload is None else self.nbytes


class DemotionQueue:
    """Results that wait to be encoded and written, findable until they are.

    Args:
        tiers: from the top; what one drops for room goes to the next.
        limit: payload bytes that may wait; what does not fit is refused.
        skip: called as (tier number, key): whether writing the value there would add nothing.
        wrote: called as (tier number, items, exception or None) after each write, in the writer thread.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        limit: int,
        skip: Callable[[int, bytes], bool],
        wrote: Callable[[int, Sequence[Item], Exception | None], None],
    ) -> None:
        self._tiers = tiers
        self._limit = limit
        self._skip = skip
        self._wrote = wrote
        self._changed = threading.Condition()
        self._waiting: OrderedDict[bytes, Pending] = OrderedDict()
        self._writing: dict[bytes, Pending] = {}
        self._nbytes = 0
        self._closed = False
        self._thread: threading.Thread | None = None

    def room_for(self, nbytes: int) -> bool:
        """Whether so many payload bytes more may wait."""
        return not self._closed and self._nbytes + nbytes <= self._limit

    def put(self, tier_key: bytes, pending: Pending) -> bool:
        """Queue one result; False if there is no room."""
        with self._changed:
            if not self.room_for(pending.held):
                return False
            old, writing = self._waiting.pop(tier_key, None), self._writing.get(tier_key)
            if old is not None:
                self._nbytes -= old.held
            # What was to go to every tier still does when it is evicted before, or while, the writer comes to it.
            if any(one is not None and one.through for one in (old, writing)):
                pending = replace(pending, through=True)
            self._nbytes += pending.held
            self._waiting[tier_key] = pending
            self._start()
            self._changed.notify_all()
        return True

    def get(self, tier_key: bytes) -> Any:
        """The payload of a result that is not written yet, or None."""
        with self._changed:
            pending = self._waiting.get(tier_key) or self._writing.get(tier_key)
            return None if pending is None else pending.payload

    def flush(self, deadline: float | None) -> bool:
        """Wait until everything queued is written, or until ``deadline`` (``time.monotonic()``); whether it is."""
        with self._changed:
            while self._waiting or self._writing:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self._changed.wait(left)
        return True

    def close(self, deadline: float) -> bool:
        """Flush, then end the thread; whether nothing was lost."""
        done = self.flush(deadline)
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(max(0.1, deadline - time.monotonic()))
        return done

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(
                target=_write_all, args=(weakref.ref(self), self._changed), name="kvcache-demotion", daemon=True
            )
            self._thread.start()

    def write_next(self) -> None:
        """Write one batch; the writer thread's work."""
        with self._changed:
            size = 0
            while self._waiting and size < _BATCH_BYTES:
                key, pending = self._waiting.popitem(last=False)
                self._writing[key] = pending
                size += pending.nbytes
        now = int(time.time())
        try:
            first: list[Item] = []
            through: list[Item] = []
            for key, pending in self._writing.items():
                value = self._encoded(key, pending, now)
                if value is not None:
                    (through if pending.through else first).append((key, value))
            self.write(first)
            self.write_through(through)
        finally:
            with self._changed:
                self._nbytes -= sum(pending.held for pending in self._writing.values())
                self._writing.clear()
                self._changed.notify_all()

    def _encoded(self, key: bytes, pending: Pending, now: int) -> Buffer | None:
        """The value to write; None if it is gone or cannot be made, which is one result lost and not the thread."""
        try:
            return pending.encode(now)
        except Exception as error:
            self._wrote(0, [(key, b"")], error)
            return None

    def write(self, items: Sequence[Item], first: int = 0) -> None:
        """Write values into the first tier from number ``first`` on that takes them, and what it drops below it."""
        for number in range(first, len(self._tiers)):
            if not items:
                return
            items = self._put(number, items)

    def write_through(self, items: Sequence[Item]) -> None:
        """Write values into every tier that outlives the process; what one drops for them goes to the next."""
        for number, tier in enumerate(self._tiers):
            if tier.persistent and items:
                mine = {key for key, _ in items}
                self.write([item for item in self._put(number, items) if item[0] not in mine], number + 1)

    def _put(self, number: int, items: Sequence[Item]) -> Sequence[Item]:
        """Write values into one tier; returns what is left for the next: those it dropped, or all if it failed."""
        items = [item for item in items if not self._skip(number, item[0])]
        if not items:
            return items
        try:
            dropped = self._tiers[number].put_many(items)
        except PartlyFailed as error:
            left = [item for item in items if item[0] in error.keys]
            self._wrote(number, [item for item in items if item[0] not in error.keys], None)
            self._wrote(number, left, error)
            return left
        except Exception as error:
            self._wrote(number, items, error)
            return items
        self._wrote(number, items, None)
        return dropped

    @property
    def idle(self) -> bool:
        """Whether nothing waits."""
        return not self._waiting

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    @property
    def nbytes(self) -> int:
        """Payload bytes that wait."""
        return self._nbytes


def _write_all(reference: weakref.ref[DemotionQueue], changed: threading.Condition) -> None:
    """The writer thread. It holds no queue while it waits, so that a forgotten one can go."""
    while True:
        queue = reference()
        if queue is None or queue.closed:
            return
        if not queue.idle:
            # Where warnings are errors, nobody here would hear them, and the counters have them.
            with contextlib.suppress(Warning):
                queue.write_next()
            continue
        del queue
        with changed:
            changed.wait(1.0)
