"""An activation as bytes, for files and other machines: the block format with one array per tensor of the result.

How the tensors hang together (tuples, dicts, dataclasses) is not in the bytes: nothing that is read names a type to be
made. A reader knows the structure from a result it has computed itself; its digest is part of the key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcache_core.blockformat import ArrayEntry, BlockCodec, Buffer, read_header
from kvcache_core.errors import BlockRefused
from kvcache_core.keys import KEY_BYTES
from kvcache_core.tree import Tree
from kvcache_core.worth import Worth

__all__ = ["EntryForm", "Payload"]

Payload = tuple[Tree, Sequence[Any]]
"""One sample's result: its structure, and its tensors without the batch's dimension."""

_WIDTHS = {
    **dict.fromkeys(("bool", "int8", "uint8", "float8_e4m3fn", "float8_e5m2"), 1),
    **dict.fromkeys(("int16", "uint16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("int32", "uint32", "float32"), 4),
    **dict.fromkeys(("int64", "uint64", "float64"), 8),
}


@dataclass(frozen=True, slots=True)
class EntryForm:
    """What the results of one module look like in a tier.

    Attributes:
        tree: the structure of a result.
        weights: 16 bytes that stand for the module and its weights.
        salt: 16-byte digest of the salt.
        export: a tensor as (dtype name, bits of its elements).
        restore: the reverse; what it is given may be read-only and short-lived.
        worth: what computing a result takes.
    """

    tree: Tree
    weights: bytes
    salt: bytes
    export: Callable[[Any], tuple[str, NDArray[Any]]]
    restore: Callable[[str, NDArray[Any]], Any]
    worth: Worth

    @property
    def structure(self) -> bytes:
        """A 16-byte digest of the structure: it stands in the place of a block's layout."""
        return blake2b(self.tree.encode(), digest_size=KEY_BYTES, person=b"kvcache-tree").digest()

    def content_key(self, key: bytes) -> bytes:
        """The key in a tier of the sample with the content key ``key``."""
        return blake2b(key + self.structure, digest_size=KEY_BYTES, person=b"kvcache-entry").digest()

    def encode(self, key: bytes, payload: Payload, secret: bytes, created: int) -> Buffer:
        """The value of one result."""
        arrays = [self.export(row) for row in payload[1]]
        entries = [ArrayEntry(at, "", dtype, bits.shape) for at, (dtype, bits) in enumerate(arrays)]
        content = b"".join(np.ascontiguousarray(bits).tobytes() for _, bits in arrays)
        return self._codec(entries, secret).encode(key, content, created)

    def decode(self, key: bytes, secret: bytes, value: Buffer) -> Payload:
        """The result in a value.

        Raises:
            BlockRefused: it is not a whole, undamaged result of this module and structure for this key.
        """
        header = read_header(value)
        content = self._codec(header.arrays, secret).decode(key, value)
        rows, at = [], 0
        for entry in header.arrays:
            width = _WIDTHS[entry.dtype]
            end = at + width * math.prod(entry.shape)
            rows.append(self.restore(entry.dtype, np.frombuffer(content[at:end], f"<u{width}").reshape(entry.shape)))
            at = end
        return self.tree, rows

    def _codec(self, entries: Sequence[ArrayEntry], secret: bytes) -> BlockCodec:
        unknown = [entry.dtype for entry in entries if entry.dtype not in _WIDTHS]
        if unknown:
            raise BlockRefused("foreign", f"dtype {unknown[0]!r} has no place in the format")
        nbytes = sum(_WIDTHS[entry.dtype] * math.prod(entry.shape) for entry in entries)
        return BlockCodec(
            entries,
            nbytes,
            layout=self.structure,
            weights=self.weights,
            salt=self.salt,
            kind="entry",
            secret=secret,
        )
