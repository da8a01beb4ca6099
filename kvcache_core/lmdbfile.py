"""An LMDB file that several tiers of a process, and several processes, have open; a damaged one is set aside."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvcache_core.errors import InvalidInput, KVCacheWarning, TierError

try:
    import lmdb
except ImportError as error:
    raise ImportError('a disk tier needs lmdb: pip install "kvcache-core[disk]"') from error

__all__ = ["LOCK_SECONDS", "SharedFile", "footprint", "held_by_another", "lmdb", "make_folder"]

LOCK_SECONDS = 10.0
"""So long opening and closing wait for a process that holds the file's lock."""

_FORMAT = b"kvcache-disk-1"
_NAMES = (b"values", b"records", b"order", b"meta")
_READERS = 512
_LOCK_BYTES = 64 * _READERS + 8192
_DAMAGED = {3, *(-getattr(signal, name, 0) for name in ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGILL", "SIGFPE"))} - {0}
"""Exit codes of the check: it says so, or the file has crashed it. Whoever was killed has found nothing."""

_CHECK_SECONDS = 600
_CHECK = """
import sys
sys.path[:] = sys.argv[4:]
import mmap
import lmdb

def look(map_size):
    # Registered as a reader, and with room: another process may write, and make it larger, meanwhile.
    env = lmdb.open(
        sys.argv[1], max_dbs=4, readonly=True, create=False, map_size=map_size, max_readers=int(sys.argv[3])
    )
    if not env.stat()["entries"]:
        return  # another process has only just made it
    with env.begin(buffers=True) as txn:
        cursor = txn.cursor()
        if not all(map(cursor.set_key, (b"values", b"records", b"order", b"meta"))):
            return  # another program's: whole or not, it is not for us to move
        for name in (b"values", b"records", b"order"):
            db = env.open_db(name, txn=txn, create=False)
            for key, value in txn.cursor(db):
                len(value) and (value[0], value[-1])

def look_with_little_memory():
    try:
        look(1 << 20)  # as much as its head says that it needs
    except lmdb.MemoryError:
        with open(sys.argv[1] + "/data.mdb", "rb") as file:
            mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)  # all of it fits: its head is wrong
        sys.exit(3)

try:
    try:
        look(int(sys.argv[2]))
    except lmdb.MemoryError:
        look_with_little_memory()
except (OSError, lmdb.MapResizedError, lmdb.ReadersFullError, lmdb.LockError, lmdb.ReadonlyError):
    pass  # nothing is known of what lies in it
except Exception:
    sys.exit(3)
"""
_PAGE, _LARGEST_SHARING = 4096, 1980
_BESIDE = 320
"""Bytes that a key takes beside its value: in the tables of records and of the order of use."""


def footprint(key: bytes, nbytes: int) -> int:
    """Bytes that a value of so many takes in a file: a large one has pages to itself, small ones share pages that are
    half full at worst.
    """
    if len(key) + nbytes > _LARGEST_SHARING:
        return -(-(nbytes + 16) // _PAGE) * _PAGE + _BESIDE
    return 2 * (len(key) + nbytes) + _BESIDE


class SharedFile:
    """One open file per process and path: LMDB forbids to open a file twice in one process.

    Attributes:
        handles: the environment and its databases: values, records, order, meta.
        users: who has it open in this process.
    """

    _open: dict[Path, SharedFile] = {}  # noqa: RUF012 (the one table of this process)
    _guard = threading.Lock()

    def __init__(self, path: Path, name: str, max_bytes: int, sync: bool) -> None:
        self._path, self.users = path, 0
        self._env: Any = None
        self._failure: Exception | None = None
        self._done = threading.Event()
        self._turns, self._inside = threading.Condition(), 0
        # Room for pages that are half full, and for those that a reader still holds.
        file = path / "data.mdb"
        largest = max(max_bytes, file.stat().st_size if file.exists() else 0)  # the budget may have been larger
        map_size = largest + largest // 4 + (16 << 20)
        inode = file.stat().st_ino if file.exists() else None
        _take_room_for_locks(path, name)
        if inode and _is_damaged(path, map_size) and file.stat().st_ino == inode:  # else another process was faster
            aside = path / f"data.mdb.{int(time.time())}-{os.getpid()}.damaged"
            file.rename(aside)
            with contextlib.suppress(OSError):
                (path / "lock.mdb").unlink()
            _take_room_for_locks(path, name)
            message = f"tier {name!r}: its file was damaged and is {aside.name} now; a new one is begun"
            warnings.warn(message, KVCacheWarning, stacklevel=2)
        # In a thread: opening takes the file's lock, for which LMDB waits without limit.
        threading.Thread(target=self._begin, args=(name, map_size, sync), name="kvcache-opening", daemon=True).start()

    @classmethod
    def open(cls, path: Path, name: str, max_bytes: int, sync: bool) -> SharedFile:
        """The file of this path, opened or shared.

        Raises:
            TierError: it cannot be opened, or another process has held its lock for too long.
        """
        with cls._guard:
            shared = cls._open.get(path)
            if shared is None:
                shared = cls._open[path] = cls(path, name, max_bytes, sync)
            shared.users += 1
        done = shared._done.wait(LOCK_SECONDS)
        if done and shared._failure is None:
            return shared
        shared.release()
        if shared._failure is not None:
            raise shared._failure
        raise TierError(f"tier {name!r} was not opened within {LOCK_SECONDS:g} s: {held_by_another(path)}")

    def release(self) -> None:
        """One user less; the last one closes."""
        with self._guard:
            self.users -= 1
            self._close_unused()

    @contextlib.contextmanager
    def transaction(self, **options: Any) -> Iterator[Any]:
        """A transaction of LMDB.

        Raises:
            TierError: the file has outgrown what is mapped of it, and threads that use it keep that from changing.
        """
        with self._turns:
            self._inside += 1
        try:
            try:
                transaction = self._env.begin(**options)
            except lmdb.MapResizedError:
                self._map_all()
                transaction = self._env.begin(**options)
            with transaction as txn:
                yield txn
        finally:
            with self._turns:
                self._inside -= 1
                self._turns.notify_all()

    def _map_all(self) -> None:
        """A process with a larger budget has made the file larger. Mapping it is for moments without a transaction."""
        with self._turns:
            self._inside -= 1
            self._turns.notify_all()
            try:
                if not self._turns.wait_for(lambda: self._inside == 0, 1.0):
                    raise TierError(f"{self._path} has grown, and cannot be mapped while it is in use")
                self._env.set_mapsize(0)
            finally:
                self._inside += 1

    def _begin(self, name: str, map_size: int, sync: bool) -> None:
        try:
            self._env = lmdb.open(
                str(self._path),
                map_size=map_size,
                max_dbs=4,
                max_readers=_READERS,
                metasync=False,
                sync=sync,
                readahead=False,
            )
            self._env.reader_check()
            self.handles = (self._env, *_databases(self._env, name))
        except lmdb.ReadonlyError as error:
            self._failure = TierError(
                f"tier {name!r} cannot be opened ({error}); let this user read and write its data.mdb and lock.mdb, or "
                "name another folder"
            )
        except (lmdb.Error, OSError) as error:
            self._failure = TierError(
                f"tier {name!r} cannot be opened ({error}); name another folder, or delete it if no process uses it"
            )
        except TierError as error:
            self._failure = error
        with self._guard:
            self._done.set()
            self._close_unused()

    def _close_unused(self) -> None:
        """Close what nobody uses, unless its opening still waits: a file may not be opened twice meanwhile."""
        if self.users or not self._done.is_set() or self._open.get(self._path) is not self:
            return
        del self._open[self._path]
        if self._env is not None:
            self._env.close()


def held_by_another(path: Path) -> str:
    """Why it waits, and the remedy."""
    return (
        f"another process holds its lock and does not let go; end that process (`fuser {path / 'lock.mdb'}` names it), "
        "or name another folder"
    )


def _databases(env: Any, name: str) -> list[Any]:
    """The handles of values, records, order and meta. The client gives lasting ones to a writer only, and lets other
    threads run while it waits only in ``begin``.
    """
    with env.begin(write=True) as txn:
        cursor = txn.cursor()
        if cursor.first() and not all(map(cursor.set_key, _NAMES)):
            raise TierError(f"tier {name!r}: its data.mdb is another program's; name a folder of its own")
        handles = [env.open_db(one, txn=txn) for one in _NAMES]
        found = txn.get(b"format", db=handles[3])
        if found is None:
            txn.put(b"format", _FORMAT, db=handles[3])
    if found not in (None, _FORMAT):
        raise TierError(f"tier {name!r} was written by another version ({found!r}); name another folder")
    return handles


def make_folder(path: Path, name: str) -> None:
    """Make a tier's folder, unless it is there.

    Raises:
        InvalidInput: it is no folder, or cannot be written.
    """
    try:
        if path.exists() and not path.is_dir():
            raise InvalidInput(f"tier {name!r}: {path} is a file; a disk tier needs a folder of its own")
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable-{os.getpid()}-{threading.get_ident()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InvalidInput(f"tier {name!r}: {path} cannot be written ({error}); name a folder that can") from None


def _take_room_for_locks(path: Path, name: str) -> None:
    """LMDB maps a new lock file before it has room on the disk; where there is none, touching it ends the process."""
    fallocate = getattr(os, "posix_fallocate", None)  # not on every system
    if fallocate is None:
        return
    try:
        with (path / "lock.mdb").open("ab") as file:
            if not os.fstat(file.fileno()).st_size:
                fallocate(file.fileno(), 0, _LOCK_BYTES)
    except PermissionError:
        return  # opening it says what is wrong
    except OSError as error:
        raise TierError(f"tier {name!r}: its disk has no room ({error}); free some, or name another folder") from None


def _is_damaged(path: Path, map_size: int) -> bool:
    """Whether the file cannot be read from end to end: tried in another process, which a damaged file may crash."""
    if not sys.executable:
        return False
    command = [sys.executable, "-I", "-c", _CHECK, str(path), str(map_size), str(_READERS), *sys.path]
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=_CHECK_SECONDS)
    except (subprocess.TimeoutExpired, OSError):  # no more processes, or no right to start one: nothing is known
        return False
    return done.returncode in _DAMAGED
