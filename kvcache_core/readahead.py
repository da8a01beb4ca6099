"""Reading ahead: one thread reads what waiting prompts will want from tiers, while other prompts are computed."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvcache_core.blockformat import Buffer

__all__ = ["Ahead", "ReadAhead", "Wanted"]


@dataclass(slots=True)
class Wanted:
    """One result that is looked for.

    Attributes:
        tier_key: where it would stand in a tier.
        decode: gives its payload from its value; raises BlockRefused.
        payload: what was found, or None.
        asked: numbers of the tiers that were asked ahead.
    """

    tier_key: bytes
    decode: Callable[[Buffer], Any]
    payload: Any = None
    asked: tuple[int, ...] = ()


@dataclass(slots=True, eq=False)
class Batch:
    """What is read at once.

    Attributes:
        wanted: what is looked for, in the order of the prompt.
        nbytes: of its payloads, at most.
        read: fills them in; never raises for what a tier does.
        keys: of everything in it.
    """

    wanted: Sequence[Wanted]
    nbytes: int
    read: Callable[[Sequence[Wanted]], None]
    keys: frozenset[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.keys = frozenset(one.tier_key for one in self.wanted)


class Ahead:
    """What is read ahead for one prompt; without a reader there is nothing to read."""

    def __init__(self, reader: ReadAhead | None = None) -> None:
        self._reader = reader
        self.left: deque[Batch] = deque()
        self.read: list[Batch] = []
        self.closed = False

    @property
    def done(self) -> bool:
        """Whether all that will be read ahead is."""
        return not self.left

    def close(self) -> None:
        """Read no more, and forget what was read. May be called twice."""
        if self._reader is not None:
            self._reader.drop(self)


class ReadAhead:
    """One thread that reads, in the order it is told, and keeps payloads until they are dropped.

    Args:
        limit: payload bytes that may be held at a time, for all prompts together; 0 turns it off.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._changed = threading.Condition()
        self._waiting: deque[Ahead] = deque()
        self._reading: Batch | None = None
        self._found: dict[bytes, Wanted] = {}
        self._nbytes = 0
        self._closed = False
        self._thread: threading.Thread | None = None

    def begin(self, batches: Iterable[Batch]) -> Ahead:
        """Read these as soon as there is room for them; the tail of what would take more than the limit is left out."""
        ahead, nbytes = Ahead(self), 0
        for batch in batches:
            nbytes += batch.nbytes
            if nbytes > self.limit:
                break
            ahead.left.append(batch)
        with self._changed:
            if self._closed:
                return Ahead()
            if ahead.left:
                self._waiting.append(ahead)
                self._start()
                self._changed.notify_all()
        return ahead

    def take(self, keys: Iterable[bytes]) -> dict[bytes, Wanted]:
        """What was asked for ahead among ``keys``. Waits for what is being read; what is not begun is called off."""
        if not self._waiting and not self._found and self._reading is None:
            return {}
        asked = set(keys)
        with self._changed:
            while True:
                for ahead in self._waiting:
                    self._call_off(ahead, asked)
                if self._reading is None or self._reading.keys.isdisjoint(asked):
                    return {key: self._found[key] for key in asked & self._found.keys()}
                self._changed.wait()

    def drop(self, ahead: Ahead) -> None:
        """Forget what was read for one prompt, and read no more for it."""
        with self._changed:
            ahead.closed = True
            ahead.left.clear()
            for batch in ahead.read:
                self._forget(batch)
            ahead.read.clear()
            self._changed.notify_all()

    def close(self, deadline: float) -> None:
        """End the thread; waits for it until ``deadline`` (``time.monotonic()``), and a tenth of a second at least."""
        with self._changed:
            self._closed = True
            for ahead in self._waiting:
                ahead.left.clear()
            self._waiting.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(max(0.1, deadline - time.monotonic()))

    @property
    def nbytes(self) -> int:
        """Payload bytes that are held or being read, at most."""
        return self._nbytes

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    @property
    def idle(self) -> bool:
        """Whether there is nothing to read now, or no room for it."""
        with self._changed:
            return self._next() is None

    def read_next(self) -> None:
        """Read one batch; the thread's work."""
        with self._changed:
            ahead = self._next()
            if ahead is None:
                return
            batch = self._reading = ahead.left[0]
            self._nbytes += batch.nbytes
            # Prompts that wait may share what they want.
            batch.wanted = [one for one in batch.wanted if one.tier_key not in self._found]
        try:
            batch.read(batch.wanted)
        finally:
            with self._changed:
                self._reading = None
                self._keep(ahead, batch)
                self._changed.notify_all()

    def _next(self) -> Ahead | None:
        """Whose batch is the next to read."""
        while self._waiting and not self._waiting[0].left:
            self._waiting.popleft()
        if not self._waiting or self._nbytes + self._waiting[0].left[0].nbytes > self.limit:
            return None
        return self._waiting[0]

    def _keep(self, ahead: Ahead, batch: Batch) -> None:
        """Make what was read findable, unless nobody wants it any more."""
        if ahead.closed or self._closed:
            self._nbytes -= batch.nbytes
            return
        ahead.left.popleft()
        ahead.read.append(batch)
        self._found.update((one.tier_key, one) for one in batch.wanted)
        if any(one.payload is None for one in batch.wanted):
            ahead.left.clear()  # nothing is used behind a gap

    def _forget(self, batch: Batch) -> None:
        self._nbytes -= batch.nbytes
        for one in batch.wanted:
            self._found.pop(one.tier_key, None)

    def _call_off(self, ahead: Ahead, asked: set[bytes]) -> None:
        """What holds one of ``asked`` and is not being read yet: it is asked for now."""
        ahead.left = deque(batch for batch in ahead.left if batch is self._reading or batch.keys.isdisjoint(asked))

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(
                target=_read_all, args=(weakref.ref(self), self._changed), name="kvcache-reading", daemon=True
            )
            self._thread.start()


def _read_all(reference: weakref.ref[ReadAhead], changed: threading.Condition) -> None:
    """The reader thread. It holds no reader while it waits, so that a forgotten one can go."""
    while True:
        with changed:
            reader = reference()
            if reader is None or reader.closed:
                return
            if reader.idle:
                del reader
                changed.wait(1.0)
                continue
        # What was not read is a gap, and whoever opens the prompt asks the tier himself and hears what is wrong.
        with contextlib.suppress(Exception):
            reader.read_next()
        del reader
