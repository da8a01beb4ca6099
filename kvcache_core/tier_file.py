"""A saved cache: one file of blocks, written at once and read like a tier that nothing is written to.

Byte by byte (numbers little-endian): the magic ``KVSAVED1``; each value; the index: a JSON text with the cache's
settings, and for each value its key, offset and size; at the very end the index's offset (8 bytes), its size (8) and
its checksum (32): CRC-32 and zeros, or HMAC-SHA-256 with a secret. Values check themselves
(docs/reference/block-format.md).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvcache_core.blockformat import Buffer, checksum, secret_from_environment
from kvcache_core.errors import BlockRefused, InvalidInput, TierError
from kvcache_core.tiers import Item, StoredItem, Tier

__all__ = ["MAGIC", "FileTier", "open_file_tier", "write_saved"]

MAGIC = b"KVSAVED1"
_END = struct.Struct("<QQ32s")
_ENTRY = struct.Struct("<HQQ")  # bytes of the key, offset, bytes of the value
_SETTINGS = struct.Struct("<I")


def write_saved(
    path: str | os.PathLike[str],
    settings: Mapping[str, Any],
    items: Iterable[Iterable[Item]],
    *,
    max_bytes: int | None = None,
    secret: bytes = b"",
) -> int:
    """Write a saved cache; whoever looks sees the whole file or none.

    Args:
        path: of the file.
        settings: plain values that a JSON text can hold.
        items: values, a few at a time, the most wanted first; of two under one key the first stays.
        max_bytes: values that would make more than so many bytes are left out.
        secret: signs the index.

    Returns:
        How many values it holds.

    Raises:
        OSError: it cannot be written; what stood there before is untouched.
    """
    target = Path(path)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.part")
    places: dict[bytes, tuple[int, int]] = {}
    text = json.dumps(dict(settings), sort_keys=True).encode()
    try:
        with temporary.open("wb") as file:
            at = file.write(MAGIC)
            for some in items:
                for key, value in some:
                    if key not in places and (max_bytes is None or at + len(value) <= max_bytes):
                        places[key] = (at, len(value))
                        at += file.write(value)
            index = b"".join(_ENTRY.pack(len(key), *place) + key for key, place in places.items())
            index = _SETTINGS.pack(len(text)) + text + index
            file.write(index + _END.pack(at, len(index), checksum(MAGIC, index, secret)))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return len(places)


class FileTier(Tier):
    """The blocks of a saved cache, read where they lie; the file may be replaced meanwhile, not written into.

    Args:
        path: a file that ``cache.save`` wrote.
        secret: what its index is signed with; default is the environment's ``KVCACHE_SECRET``.

    Attributes:
        settings: of the cache that was saved.

    Raises:
        BlockRefused: it is no saved cache, is damaged, or is signed with another secret.
        OSError: it cannot be read.
    """

    persistent = True
    read_only = True

    def __init__(self, path: str | os.PathLike[str], secret: bytes | None = None) -> None:
        self.name = f"file:{path}"
        self._file = Path(path).open("rb", buffering=0)  # noqa: SIM115 (closed by close)
        try:
            index = self._read_index(path, secret_from_environment() if secret is None else secret)
            (size,) = _SETTINGS.unpack_from(index)
            self.settings: dict[str, Any] = json.loads(index[_SETTINGS.size : _SETTINGS.size + size])
            self._places = dict(_places(index, _SETTINGS.size + size))
        except BaseException:
            self._file.close()
            raise

    def _read_index(self, path: object, secret: bytes) -> bytes:
        """The index, which nothing is believed of before its checksum is right."""
        length = os.fstat(self._file.fileno()).st_size
        if length < len(MAGIC) + _END.size or self._read(0, len(MAGIC)) != MAGIC:
            raise BlockRefused("foreign", f"{path} is no saved cache")
        at, size, expected = _END.unpack(self._read(length - _END.size, _END.size))
        if at + size + _END.size != length:
            raise BlockRefused("size", f"{path} is cut short or damaged")
        index = self._read(at, size)
        if checksum(MAGIC, index, secret) != expected:
            raise BlockRefused("checksum", f"{path} is damaged, or signed with another secret")
        return index

    def _read(self, at: int, size: int) -> bytes:
        return os.pread(self._file.fileno(), size, at)

    def get_many(self, keys: Sequence[bytes]) -> list[Buffer | None]:
        """The value of each key, or None."""
        places = [self._places.get(key) for key in keys]
        return [None if place is None else self._read(*place) for place in places]

    def put_many(self, items: Sequence[Item]) -> list[Item]:
        """Nothing is written."""
        return list(items)

    def contains(self, key: bytes) -> bool:
        """Whether the key is there."""
        return key in self._places

    def items(self, head_bytes: int = 0) -> Iterator[StoredItem]:
        """What lies in the file."""
        for key, (at, size) in self._places.items():
            yield StoredItem(key, size, self._read(at, min(size, head_bytes)))

    def values(self) -> Iterator[Item]:
        """Every key and value, read one by one."""
        return ((key, self._read(*place)) for key, place in self._places.items())

    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(len(key) + size for key, (_, size) in self._places.items())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def open_file_tier(url: str) -> FileTier:
    """A :class:`FileTier` from ``file:PATH``.

    Raises:
        InvalidInput: it names no file.
        TierError: there is no such file, or it is no undamaged saved cache.
    """
    if not url.partition(":")[2]:
        raise InvalidInput(f"tier {url!r} needs a file: 'file:PATH', which cache.save(PATH) makes")
    try:
        return FileTier(url.partition(":")[2])
    except (OSError, BlockRefused) as error:
        raise TierError(f"tier {url!r} cannot be opened ({error}); cache.save(path) makes such a file") from error


def _places(index: bytes, at: int) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """(key, (offset, size)) of every value; the index is whole, so nothing needs checking."""
    while at < len(index):
        length, offset, size = _ENTRY.unpack_from(index, at)
        at += _ENTRY.size
        yield index[at : at + length], (offset, size)
        at += length
