"""The tier on disk: LMDB, one file shared by several processes, least recently used first out. Extra ``disk``."""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from kvcache_core import lmdbfile
from kvcache_core.blockformat import Buffer
from kvcache_core.errors import InvalidInput, KVCacheWarning, TierError
from kvcache_core.lmdbfile import SharedFile, footprint, held_by_another, lmdb, make_folder
from kvcache_core.tiers import Item, StoredItem, Tier
from kvcache_core.tierurl import TierUrl
from kvcache_core.waiting import within

__all__ = ["DiskTier", "open_disk_tier"]

_DEFAULT_MAX = 20 << 30
_MINIMUM = 1 << 20
_STATE = struct.Struct("<QQ")  # bytes of all keys and values; the next number in the order of use
_RECORD = struct.Struct("<QQQ")  # a key's number in the order of use, bytes, hits
_ORDER = struct.Struct(">Q")
_TOUCHES = 256
"""So many keys that were read wait before their order is written."""


def open_disk_tier(url: str) -> DiskTier:
    """A :class:`DiskTier` from ``disk:PATH?max=20GiB&sync=off``."""
    at = TierUrl(url, "disk:PATH?max=20GiB&sync=on", ("max", "sync"))
    path = unquote(url.partition(":")[2].partition("?")[0])
    if not path:
        raise at.error("it needs a folder")
    size = at.size("max", f"{_DEFAULT_MAX}", least=_MINIMUM)
    return DiskTier(path, size, sync=at.switch("sync", default=True))


class DiskTier(Tier):
    """Values in an LMDB file.

    Every write is a transaction, so a process may be killed at any moment. With ``sync`` a power cut loses the last
    transactions and nothing else; without, it may cost the file, which is then started anew.

    A file that is damaged when it is opened (checked by reading it in another process, since a damaged file can
    crash the one that reads it) is set aside as ``*.damaged``, with a warning, and a new one is begun.

    Args:
        path: a folder; made if it is not there. Other processes may have it open.
        max_bytes: budget for what keys and values take in the file, whole pages for large ones; the least recently used
            are deleted. The file is up to a quarter larger. Of several processes' budgets the least counts.
        sync: whether each transaction waits for the disk.

    Raises:
        InvalidInput: a budget below 1 MiB, or a path that is no folder or cannot be written.
        TierError: the file cannot be opened.
    """

    persistent = True
    exact_contains = True

    def __init__(self, path: str | os.PathLike[str], max_bytes: int = _DEFAULT_MAX, *, sync: bool = True) -> None:
        self.path = Path(path).absolute()
        self.name = f"disk:{path}"
        if max_bytes < _MINIMUM:
            raise InvalidInput(f"tier {self.name!r}: max must be at least 1 MiB, got {max_bytes} bytes")
        self.max_bytes = max_bytes
        self._sync = sync
        self._lock = threading.Lock()
        self._touched: dict[bytes, int] = {}
        self._toucher: threading.Thread | None = None
        self._turn = threading.RLock()
        self._closing = False
        self._leased = threading.local()
        make_folder(self.path, self.name)
        self._env: Any = None
        self._shared = SharedFile.open(self.path, self.name, max_bytes, sync)
        self._env, self._values, self._records, self._order, self._meta = self._shared.handles

    def get_many(self, keys: Sequence[bytes]) -> list[Buffer | None]:
        """The value of each key, or None: one transaction."""
        with self._reading() as txn:
            found: list[Buffer | None] = [txn.get(key, db=self._values) for key in keys]
        with self._lock:
            for key, value in zip(reversed(keys), reversed(found), strict=True):
                if value is not None:
                    hits = self._touched.pop(key, 0)
                    self._touched[key] = hits + 1
            full = len(self._touched) >= _TOUCHES
        if full:
            self._start_toucher()
        return found

    def peek(self, key: bytes) -> Buffer | None:
        """The value of a key, or None; not counted as a hit."""
        with self._reading() as txn:
            value: Buffer | None = txn.get(key, db=self._values)
        return value

    def contains(self, key: bytes) -> bool:
        """Whether the key is there."""
        with self._reading() as txn:
            return txn.get(key, db=self._records) is not None

    def put_many(self, items: Sequence[Item]) -> list[Item]:
        """Store values in one transaction, after making room; returns what was deleted if there is a tier below."""
        try:
            return self._put(items, self.max_bytes)
        except lmdb.MapFullError:
            # The free pages lie scattered, or a reader holds them: make more of them and try once more.
            dropped = self._give_up_a_quarter()
            return dropped + self._put(items, self.max_bytes)

    def _give_up_a_quarter(self) -> list[Item]:
        """In growing steps: to delete takes pages too, and gives back more for the steps behind it."""
        dropped: list[Item] = []
        least, step = None, 1 << 16
        while True:
            with self._writing() as txn:
                used, _ = self._state(txn)
                least = used - used // 4 if least is None else least
                if used <= least:
                    return dropped
                dropped += self._make_room(txn, max(least, used - step), used)[1]
            step *= 2

    def _put(self, items: Sequence[Item], budget: int) -> list[Item]:
        dropped: list[Item] = []
        with self._writing() as txn:
            self._write_touches(txn)
            used, number = self._state(txn)
            for key, value in items:
                size = footprint(key, len(value))
                if size > budget:
                    dropped.append((key, value))
                    continue
                used -= self._delete(txn, key)
                if used + size > budget:
                    used, gone = self._make_room(txn, budget - size, used)
                    dropped += gone
                txn.put(key, value, db=self._values)
                txn.put(key, _RECORD.pack(number, size, 0), db=self._records)
                txn.put(_ORDER.pack(number), key, db=self._order)
                used, number = used + size, number + 1
            txn.put(b"state", _STATE.pack(used, number), db=self._meta)
        return dropped

    def delete_many(self, keys: Sequence[bytes]) -> int:
        """Forget values; returns how many there were."""
        with self._writing() as txn:
            used, number = self._state(txn)
            sizes = [self._delete(txn, key) for key in keys]
            txn.put(b"state", _STATE.pack(used - sum(sizes), number), db=self._meta)
        return sum(size > 0 for size in sizes)

    def items(self, head_bytes: int = 0) -> Iterator[StoredItem]:
        """What lies in the file, least recently used first."""
        with self._reading() as txn:
            for _, key in txn.cursor(self._order):
                record = txn.get(key, db=self._records)
                value = txn.get(key, db=self._values)
                if record is not None and value is not None:
                    hits = _RECORD.unpack(record)[2]
                    yield StoredItem(bytes(key), len(value), bytes(value[:head_bytes]), hits)

    def nbytes(self) -> int:
        """Bytes that keys and values take in the file."""
        with self._reading() as txn:
            return self._state(txn)[0]

    def flush(self) -> None:
        """Wait for the disk."""
        with self._turn:
            with self._writing() as txn:
                self._write_touches(txn)
            self._env.sync(True)

    def close(self) -> None:
        """Close the file, if nobody else in this process has it open.

        While another process holds the file's lock this waits for ten seconds at most, if something was read whose
        order of use is to be written or a write is under way; a warning says so, and it is closed as soon as it can be.
        """
        if self._env is None or self._closing:
            return
        self._closing = True
        try:
            within(time.monotonic() + lmdbfile.LOCK_SECONDS, self._close)
        except TimeoutError:
            warnings.warn(
                f"tier {self.name!r} was not closed within {lmdbfile.LOCK_SECONDS:g} s, and will be when its lock is "
                f"free: {held_by_another(self.path)}",
                KVCacheWarning,
                stacklevel=2,
            )

    def _close(self) -> None:
        with self._turn:  # a thread that waits for the lock uses the file
            with contextlib.suppress(lmdb.Error):
                if self._touched:
                    with self._shared.transaction(write=True) as txn:
                        self._write_touches(txn)
            self._env = None
            self._shared.release()

    @contextlib.contextmanager
    def lease(self) -> Iterator[None]:
        """Inside, this thread's values are views into the file, valid to the end."""
        with self._opened().transaction(buffers=True) as txn:
            self._leased.txn = txn
            try:
                yield
            finally:
                self._leased.txn = None

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Any]:
        leased = getattr(self._leased, "txn", None)
        if leased is not None:
            yield leased
            return
        with self._opened().transaction() as txn:
            yield txn

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Any]:
        with self._turn, self._opened().transaction(write=True) as txn:
            yield txn

    def _opened(self) -> SharedFile:
        if self._env is None or self._closing:
            raise TierError(f"tier {self.name!r} is closed")
        return self._shared

    def _state(self, txn: Any) -> tuple[int, int]:
        """Bytes held, and the next number in the order of use."""
        state = txn.get(b"state", db=self._meta)
        return (0, 1) if state is None else _STATE.unpack(state)

    def _make_room(self, txn: Any, budget: int, used: int) -> tuple[int, list[Item]]:
        """Delete the least recently used values until ``budget`` is kept; what is held then, and what went."""
        gone: list[Item] = []
        cursor = txn.cursor(self._order)
        while used > budget and cursor.first():
            key = bytes(cursor.value())
            if self.keep_displaced:
                value = txn.get(key, db=self._values)
                if value is not None:
                    gone.append((key, value))
            used -= self._delete(txn, key) or used
        txn.put(b"state", _STATE.pack(used, self._state(txn)[1]), db=self._meta)
        return used, gone

    def _delete(self, txn: Any, key: bytes) -> int:
        """Forget one value; the bytes it took."""
        record = txn.pop(key, db=self._records)
        if record is None:
            return 0
        number, size, _ = _RECORD.unpack(record)
        txn.delete(_ORDER.pack(number), db=self._order)
        txn.delete(key, db=self._values)
        return int(size)

    def _start_toucher(self) -> None:
        """Write the order of use from a thread: a read must not wait for a process that holds the file's lock."""
        with self._lock:
            if self._toucher is not None and self._toucher.is_alive():
                return
            toucher = threading.Thread(target=self._touch, name="kvcache-touches", daemon=True)
            with contextlib.suppress(RuntimeError):  # the interpreter ends: close writes it
                toucher.start()
                self._toucher = toucher

    def _touch(self) -> None:
        with contextlib.suppress(lmdb.Error, TierError), self._writing() as txn:
            self._write_touches(txn)

    def _write_touches(self, txn: Any) -> None:
        """Put what was read to the end of the order of use."""
        with self._lock:
            touched, self._touched = self._touched, {}
        if not touched:
            return
        used, number = self._state(txn)
        for key, hits in touched.items():
            record = txn.get(key, db=self._records)
            if record is None:
                continue
            old, size, before = _RECORD.unpack(record)
            txn.delete(_ORDER.pack(old), db=self._order)
            txn.put(key, _RECORD.pack(number, size, before + hits), db=self._records)
            txn.put(_ORDER.pack(number), key, db=self._order)
            number += 1
        txn.put(b"state", _STATE.pack(used, number), db=self._meta)
