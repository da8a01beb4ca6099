"""The way down: a bounded queue and one writer thread, so that a step never waits for a tier."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvcache_core.blockformat import BlockCodec, Buffer
from kvcache_core.tiers import Item, Tier

__all__ = ["DemotionQueue", "Pending"]

_BATCH_BYTES = 32 << 20
"""Bytes that are written at once: few enough that flush and close see progress."""


@dataclass(frozen=True, slots=True)
class Pending:
    """A payload on its way down."""

    codec: BlockCodec
    key: bytes
    payload: Buffer


class DemotionQueue:
    """Payloads that wait to be encoded and written, findable until they are.

    Args:
        tiers: from the top; what one drops for room goes to the next.
        limit: payload bytes that may wait; what does not fit is refused.
        skip: called as (tier number, key): whether that tier has the value already.
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
        """Queue one payload; False if there is no room."""
        with self._changed:
            if not self.room_for(len(pending.payload)):
                return False
            old = self._waiting.pop(tier_key, None)
            self._nbytes += len(pending.payload) - (0 if old is None else len(old.payload))
            self._waiting[tier_key] = pending
            self._start()
            self._changed.notify_all()
        return True

    def get(self, tier_key: bytes) -> Pending | None:
        """A payload that is not written yet."""
        with self._changed:
            return self._waiting.get(tier_key) or self._writing.get(tier_key)

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
                size += len(pending.payload)
        now = int(time.time())
        try:
            self.write([(key, one.codec.encode(one.key, one.payload, now)) for key, one in self._writing.items()])
        finally:
            with self._changed:
                self._nbytes -= sum(len(pending.payload) for pending in self._writing.values())
                self._writing.clear()
                self._changed.notify_all()

    def write(self, items: Sequence[Item], first: int = 0) -> None:
        """Write values into the first tier from number ``first`` on that takes them, and what it drops below it."""
        for number in range(first, len(self._tiers)):
            items = [item for item in items if not self._skip(number, item[0])]
            if not items:
                return
            try:
                dropped = self._tiers[number].put_many(items)
            except Exception as error:
                # This tier is out of order: the next one down takes them.
                self._wrote(number, items, error)
                continue
            self._wrote(number, items, None)
            items = dropped

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
