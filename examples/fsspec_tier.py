"""A tier of your own: blocks in any file system that fsspec knows (S3, GCS, Azure, SFTP, local, memory).

    import fsspec
    from examples.fsspec_tier import FileSystemTier

    cache = KVCache(size=4096, tiers=["ram:4GiB", FileSystemTier(fsspec.filesystem("s3"), "bucket/kvcache")])

Two methods are needed, the rest is for `kvcache inspect`. `kvcache_core.testing.check_tier` is its test.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from uuid import uuid4

from kvcache_core.tiers import Item, StoredItem, Tier


class FileSystemTier(Tier):
    """One file per value, named by the key in hexadecimal."""

    persistent = True

    def __init__(self, file_system: Any, root: str) -> None:
        self.name = f"fsspec:{root}"
        self._files, self._root = file_system, root.rstrip("/")
        self._files.makedirs(self._root, exist_ok=True)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes | None]:
        if not keys:
            return []
        paths = {self._path(key) for key in keys}
        found = self._files.cat(sorted(paths), on_error="return")
        values = {path: value for path, value in _absolute(found, paths).items() if isinstance(value, bytes)}
        return [values.get(self._path(key)) for key in keys]

    def put_many(self, items: Sequence[Item]) -> list[Item]:
        for key, value in items:
            # Under another name first, so that nobody reads half a value.
            temporary = f"{self._path(key)}.{uuid4().hex}.part"
            self._files.pipe_file(temporary, bytes(value))
            self._files.mv(temporary, self._path(key))
        return []

    def delete_many(self, keys: Sequence[bytes]) -> int:
        there = [path for path in map(self._path, keys) if self._files.exists(path)]
        for path in there:
            self._files.rm_file(path)
        return len(there)

    def items(self, head_bytes: int = 0) -> Iterator[StoredItem]:
        for info in self._files.ls(self._root, detail=True):
            name = info["name"].rsplit("/", 1)[-1]
            if not name.endswith(".part"):
                head = self._files.cat_file(info["name"], start=0, end=head_bytes) if head_bytes else b""
                yield StoredItem(bytes.fromhex(name), info["size"], head)

    def _path(self, key: bytes) -> str:
        return f"{self._root}/{key.hex()}"


def _absolute(found: Any, paths: set[str]) -> dict[str, Any]:
    """A file system may give back other spellings of the paths it was asked for, and a lone value for one path."""
    if not isinstance(found, dict):
        return {next(iter(paths)): found}
    by_name = {path.rsplit("/", 1)[-1]: path for path in paths}
    return {by_name[path.rsplit("/", 1)[-1]]: value for path, value in found.items()}
