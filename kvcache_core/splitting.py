"""Values over a size limit, in parts: a key for each, and a manifest under the value's own."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from kvcache_core.blockformat import Buffer

__all__ = ["MANIFEST_BYTES", "in_parts", "is_split", "part_name", "read_manifest"]

_PART_PREFIX = b"kvcache-part:"
_MAGIC = b"KVSPLIT1"
_MANIFEST = struct.Struct("<8sIQ")  # magic, parts, bytes of the whole value
_MAX_PARTS = 1 << 16

MANIFEST_BYTES = _MANIFEST.size


def in_parts(name: bytes, value: Buffer, limit: int) -> Iterator[tuple[bytes, Buffer]]:
    """The names and values to store: parts of at most ``limit`` bytes first, what announces them last.

    Example:
        >>> [(name, bytes(part)) for name, part in in_parts(b"a", b"12345", 3)][:2]
        [(b'kvcache-part:a#0', b'123'), (b'kvcache-part:a#1', b'45')]
    """
    if len(value) <= limit and not is_split(value):
        yield name, value
        return
    view = memoryview(value)
    count = -(-len(view) // limit)
    for number in range(count):
        yield part_name(name, number), view[number * limit : (number + 1) * limit]
    yield name, _MANIFEST.pack(_MAGIC, count, len(view))


def is_split(value: Buffer) -> bool:
    """Whether a value is a manifest."""
    return bytes(value[: len(_MAGIC)]) == _MAGIC


def read_manifest(value: Buffer) -> tuple[int, int]:
    """(parts, bytes) that a manifest announces; no parts and an impossible size if it is damaged."""
    if len(value) < _MANIFEST.size:
        return 0, -1
    _, count, size = _MANIFEST.unpack_from(value)
    return (count, size) if count <= _MAX_PARTS else (0, -1)


def part_name(name: bytes, number: int) -> bytes:
    """The key of part ``number`` of the value under ``name``."""
    return _PART_PREFIX + name + b"#" + str(number).encode()
