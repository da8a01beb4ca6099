"""An LMDB file that several tiers of a process, and several processes, have open; a damaged one is set aside."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from kvcache_core.errors import InvalidInput, TierError

try:
    import lmdb
except ImportError as error:
    raise ImportError('a disk tier needs lmdb: pip install "kvcache-core[disk]"') from error

__all__ = ["LOCK_SECONDS", "SharedFile", "held_by_another", "lmdb", "make_folder"]

LOCK_SECONDS = 10.0
"""So long opening and closing wait for a process that holds the file's lock."""

_FORMAT = b"kvcache-disk-1"
_NAMES = (b"values", b"records", b"order", b"meta")
_CHECK = """
import sys, lmdb
env = lmdb.open(sys.argv[1], max_dbs=4, readonly=True, lock=False, create=False)
if not env.stat()["entries"]:
    sys.exit(0)  # another process has only just made it
with env.begin(buffers=True) as txn:
    for name in (b"values", b"records", b"order"):
        db = env.open_db(name, txn=txn, create=False)
        for key, value in txn.cursor(db):
            len(value) and (value[0], value[-1])
"""


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
        file = path / "data.mdb"
        if file.exists() and not _is_sound(path):
            aside = path / f"data.mdb.{int(time.time())}-{os.getpid()}.damaged"
            file.rename(aside)
            with contextlib.suppress(OSError):
                (path / "lock.mdb").unlink()
        # In a thread: opening takes the file's lock, for which LMDB waits without limit.
        threading.Thread(target=self._begin, args=(name, max_bytes, sync), name="kvcache-opening", daemon=True).start()

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

    def _begin(self, name: str, max_bytes: int, sync: bool) -> None:
        try:
            self._env = lmdb.open(
                str(self._path),
                # Room for pages that are half full, and for those that a reader still holds.
                map_size=max_bytes + max_bytes // 4 + (16 << 20),
                max_dbs=4,
                max_readers=512,
                metasync=False,
                sync=sync,
                readahead=False,
            )
            self._env.reader_check()
            self.handles = (self._env, *_databases(self._env, name))
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


def _is_sound(path: Path) -> bool:
    """Whether the file can be read from end to end: tried in another process, which a damaged file may crash."""
    if not sys.executable:
        return True
    done = subprocess.run(
        [sys.executable, "-I", "-c", _CHECK, str(path)], capture_output=True, check=False, timeout=600
    )
    return done.returncode == 0
