"""An LMDB file that several tiers of a process, and several processes, have open; a damaged one is set aside."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from kvcache_core.errors import InvalidInput, TierError

try:
    import lmdb
except ImportError as error:
    raise ImportError('a disk tier needs lmdb: pip install "kvcache-core[disk]"') from error

__all__ = ["SharedFile", "lmdb", "make_folder"]

_FORMAT = b"kvcache-disk-1"
_CHECK = """
import sys, lmdb
env = lmdb.open(sys.argv[1], max_dbs=4, readonly=True, lock=False, create=False)
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
        self._path, self.users = path, 1
        file = path / "data.mdb"
        if file.exists() and not _is_sound(path):
            aside = path / f"data.mdb.{int(time.time())}-{os.getpid()}.damaged"
            file.rename(aside)
            with contextlib.suppress(OSError):
                (path / "lock.mdb").unlink()
        try:
            self._env = lmdb.open(
                str(path),
                # Room for pages that are half full, and for those that a reader still holds.
                map_size=max_bytes + max_bytes // 4 + (16 << 20),
                max_dbs=4,
                max_readers=512,
                metasync=False,
                sync=sync,
                readahead=False,
            )
            self._env.reader_check()
            names = (b"values", b"records", b"order", b"meta")
            databases = [self._env.open_db(one) for one in names]
            with self._env.begin(write=True) as txn:
                found = txn.get(b"format", db=databases[3])
                if found is None:
                    txn.put(b"format", _FORMAT, db=databases[3])
        except (lmdb.Error, OSError) as error:
            raise TierError(
                f"tier {name!r} cannot be opened ({error}); name another folder, or delete it if no process uses it"
            ) from error
        if found not in (None, _FORMAT):
            self._env.close()
            raise TierError(f"tier {name!r} was written by another version ({found!r}); name another folder")
        self.handles = (self._env, *databases)

    @classmethod
    def open(cls, path: Path, name: str, max_bytes: int, sync: bool) -> SharedFile:
        """The file of this path, opened or shared."""
        with cls._guard:
            known = cls._open.get(path)
            if known is None:
                known = cls._open[path] = cls(path, name, max_bytes, sync)
            else:
                known.users += 1
            return known

    def release(self) -> None:
        """One user less; the last one closes."""
        with self._guard:
            self.users -= 1
            if not self.users:
                del self._open[self._path]
                self._env.close()


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
