"""A block as bytes, for files and for other machines. Documented byte by byte in docs/reference/block-format.md.

Reading never trusts a length: every field is checked against the bytes that are there, and nothing in a value is
executed or sized by it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from kvcache_core.crc import crc32
from kvcache_core.errors import BlockRefused, InvalidInput
from kvcache_core.layout import BlockLayout

__all__ = [
    "FORMAT_VERSION",
    "ArrayEntry",
    "BlockCodec",
    "Buffer",
    "Header",
    "check_value",
    "checksum",
    "group_entries",
    "read_header",
    "salt_digest",
    "secret_from_environment",
]

Buffer: TypeAlias = "bytes | bytearray | memoryview"

FORMAT_VERSION = 1
MAGIC = b"KVBLOCK\0"
KINDS = {"block": 1, "entry": 2}
CHECKSUM_BYTES = 32
_DIGEST = 16
_SIGNED = 1

# magic, version, flags, header bytes, payload bytes | kind, group, arrays | layout, weights, salt
_FIXED = struct.Struct("<8sHHIQ HHI 16s16s16s")
# chain key, creation time: what differs between the blocks of one codec
_OWN = struct.Struct("<16sQ")
_HEAD = _FIXED.size + _OWN.size
_ENTRY = struct.Struct("<IBBH")
_MAX_ENTRIES = 1 << 16
_MAX_DIMENSIONS = 8


@dataclass(frozen=True, slots=True)
class ArrayEntry:
    """One array of a payload: where it belongs and its shape; arrays follow each other without gaps."""

    layer: int
    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Header:
    """What a stored block says about itself.

    Attributes:
        version: of the format.
        signed: whether the checksum is a HMAC.
        kind: ``"block"`` (attention state of tokens) or ``"entry"`` (a module's output).
        group: layer group.
        layout: 16-byte digest of the layout.
        weights: 16-byte portable identity of the weights.
        salt: 16-byte digest of the salt.
        key: 16-byte chained key.
        created: seconds since 1970 by the writer's clock.
        arrays: what the payload holds.
        header_bytes: bytes before the payload.
        payload_bytes: bytes of the payload.
    """

    version: int
    signed: bool
    kind: str
    group: int
    layout: bytes
    weights: bytes
    salt: bytes
    key: bytes
    created: int
    arrays: tuple[ArrayEntry, ...]
    header_bytes: int
    payload_bytes: int


class BlockCodec:
    """Writes and reads the values of one layer group of one model and salt.

    What it reads is its own kind to the last byte of the header, carries the key that was asked for, and has the
    right checksum; anything else is refused.

    Args:
        arrays: what a payload holds.
        payload_bytes: its size.
        layout: 16-byte layout digest.
        weights: 16-byte portable identity of the weights.
        salt: 16-byte digest of the salt, :func:`salt_digest`.
        group: layer group.
        kind: ``"block"`` or ``"entry"``.
        secret: signs each value (HMAC-SHA-256) instead of a CRC-32, and refuses what is not signed with it.
    """

    def __init__(
        self,
        arrays: Sequence[ArrayEntry],
        payload_bytes: int,
        *,
        layout: bytes,
        weights: bytes,
        salt: bytes,
        group: int = 0,
        kind: str = "block",
        secret: bytes = b"",
    ) -> None:
        table = b"".join(_pack_entry(entry) for entry in arrays)
        table += bytes(-(_HEAD + len(table)) % 8)
        self._secret = secret
        self.payload_bytes = payload_bytes
        self.header_bytes = _HEAD + len(table)
        self._fixed = _FIXED.pack(
            MAGIC,
            FORMAT_VERSION,
            _SIGNED if secret else 0,
            self.header_bytes,
            payload_bytes,
            KINDS[kind],
            group,
            len(arrays),
            layout,
            weights,
            salt,
        )
        self._table = table

    @property
    def value_bytes(self) -> int:
        """Bytes of a whole value."""
        return self.header_bytes + self.payload_bytes + CHECKSUM_BYTES

    def encode(self, key: bytes, payload: Buffer, created: int) -> Buffer:
        """The value to store for a payload.

        Raises:
            InvalidInput: the payload has another size.
        """
        if len(payload) != self.payload_bytes:
            raise InvalidInput(f"a payload of {self.payload_bytes} bytes is needed, got {len(payload)}")
        head = self._fixed + _OWN.pack(key, created) + self._table
        value = np.empty(self.value_bytes, np.uint8)
        parts = value.data
        parts[: len(head)] = head
        # numpy copies without the interpreter's lock: a step that runs meanwhile does not wait for it.
        value[len(head) : -CHECKSUM_BYTES] = np.asarray(memoryview(payload).cast("B"))
        parts[-CHECKSUM_BYTES:] = checksum(head, payload, self._secret)
        return parts

    def decode(self, key: bytes, value: Buffer) -> memoryview:
        """The payload of a value, without a copy.

        Raises:
            BlockRefused: it is not a whole, undamaged value of this codec for this key.
        """
        view = memoryview(value).cast("B")
        if len(view) != self.value_bytes:
            raise BlockRefused("size", f"{len(view)} bytes where {self.value_bytes} belong")
        fixed = _FIXED.size
        if view[:fixed] != self._fixed or view[_HEAD : self.header_bytes] != self._table:
            raise BlockRefused("foreign", "another format version, model, layout, salt or signature")
        if view[fixed : fixed + _DIGEST] != key:
            raise BlockRefused("key", "it stands under a key that is not its own")
        head, payload = view[: self.header_bytes], view[self.header_bytes : -CHECKSUM_BYTES]
        if not hmac.compare_digest(checksum(head, payload, self._secret), bytes(view[-CHECKSUM_BYTES:])):
            raise BlockRefused("checksum", "damaged, or signed with another secret")
        return payload


def group_entries(layout: BlockLayout, group: int) -> tuple[ArrayEntry, ...]:
    """The arrays of a packed block of a layer group."""
    return tuple(ArrayEntry(array.layer, array.name, array.dtype, array.shape) for array in layout.packed(group))


def salt_digest(salt: bytes) -> bytes:
    """16 bytes that stand for a salt in a header."""
    return hashlib.blake2b(salt, digest_size=_DIGEST, person=b"kvcache-salt").digest()


def secret_from_environment() -> bytes:
    """The bytes of ``KVCACHE_SECRET``, which signs every stored block; empty if it is not set."""
    return os.environ.get("KVCACHE_SECRET", "").encode()


def read_header(value: Buffer) -> Header:
    """The header of any value of this format, for a look at what lies in a store. Checks no checksum.

    Raises:
        BlockRefused: no header of a known version stands at the start.
    """
    view = memoryview(value).cast("B")
    if len(view) < _HEAD or view[:8] != MAGIC:
        raise BlockRefused("foreign", "no block of this library")
    _, version, flags, header_bytes, payload_bytes, kind, group, count, layout, weights, salt = _FIXED.unpack_from(view)
    key, created = _OWN.unpack_from(view, _FIXED.size)
    names = {number: name for name, number in KINDS.items()}
    if version != FORMAT_VERSION or flags & ~_SIGNED or kind not in names:
        raise BlockRefused("foreign", f"format version {version}, kind {kind}, flags {flags:#x} are not known here")
    if not _HEAD <= header_bytes <= len(view) or count > _MAX_ENTRIES:
        raise BlockRefused("size", "the header is longer than the value")
    arrays = _read_entries(view[_HEAD:header_bytes], count)
    return Header(
        version,
        bool(flags & _SIGNED),
        names[kind],
        group,
        layout,
        weights,
        salt,
        key,
        created,
        arrays,
        header_bytes,
        payload_bytes,
    )


def check_value(value: Buffer, secret: bytes = b"") -> Header:
    """Read a header and check size and checksum of the whole value.

    Raises:
        BlockRefused: it is damaged, of another version, or signed with another secret.
    """
    header = read_header(value)
    view = memoryview(value).cast("B")
    if len(view) != header.header_bytes + header.payload_bytes + CHECKSUM_BYTES:
        raise BlockRefused("size", f"{len(view)} bytes are not what the header says")
    if header.signed and not secret:
        raise BlockRefused("checksum", "it is signed: set KVCACHE_SECRET to verify it")
    head, payload = view[: header.header_bytes], view[header.header_bytes : -CHECKSUM_BYTES]
    expected = checksum(head, payload, secret if header.signed else b"")
    if not hmac.compare_digest(expected, bytes(view[-CHECKSUM_BYTES:])):
        raise BlockRefused("checksum", "damaged, or signed with another secret")
    return header


def checksum(head: Buffer, payload: Buffer, secret: bytes) -> bytes:
    """32 bytes over both: HMAC-SHA-256 with a secret, else CRC-32 and zeros."""
    if secret:
        mac = hmac.new(secret, head, hashlib.sha256)
        mac.update(payload)
        return mac.digest()
    return struct.pack("<I28x", crc32(payload, crc32(head)))


def _pack_entry(entry: ArrayEntry) -> bytes:
    dtype, name = entry.dtype.encode(), entry.name.encode()
    head = _ENTRY.pack(entry.layer, len(entry.shape), len(dtype), len(name))
    return head + struct.pack(f"<{len(entry.shape)}I", *entry.shape) + dtype + name


def _read_entries(table: memoryview, count: int) -> tuple[ArrayEntry, ...]:
    entries = []
    at = 0
    try:
        for _ in range(count):
            layer, dimensions, dtype, name = _ENTRY.unpack_from(table, at)
            at += _ENTRY.size
            if dimensions > _MAX_DIMENSIONS:
                raise BlockRefused("size", f"an array of {dimensions} dimensions")
            shape = struct.unpack_from(f"<{dimensions}I", table, at)
            at += 4 * dimensions
            text = bytes(table[at : at + dtype + name])
            if len(text) != dtype + name:
                raise BlockRefused("size", "the table of arrays ends early")
            entries.append(ArrayEntry(layer, text[dtype:].decode(), text[:dtype].decode(), shape))
            at += dtype + name
    except (struct.error, UnicodeDecodeError) as error:
        raise BlockRefused("size", f"the table of arrays is damaged ({error})") from None
    return tuple(entries)
