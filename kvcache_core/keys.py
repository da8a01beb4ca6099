"""Chained 128-bit keys: the identity of a block is everything up to its last token.

The chain starts from a root that holds the namespace (weights, layout) and the caller's salt, so a block can
only be found by whoever shares both. The idea of chaining block digests is vLLM's prefix cache; unlike there
every field is tagged and length-prefixed, so that no two inputs have the same encoding.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from hashlib import blake2b

__all__ = ["KEY_BYTES", "block_key", "extras_bytes", "root_key"]

KEY_BYTES = 16

_ROOT = b"kvcache-root-1"


def root_key(block_size: int, namespace: bytes, salt: bytes) -> bytes:
    """The key that the first block of every sequence of this namespace and salt chains from."""
    digest = blake2b(_ROOT, digest_size=KEY_BYTES)
    for field in (struct.pack("<I", block_size), namespace, salt):
        digest.update(struct.pack("<Q", len(field)) + field)
    return digest.digest()


def block_key(parent: bytes, tokens: bytes, extras: bytes = b"") -> bytes:
    """The key of a full block.

    Args:
        parent: key of the block before it, or the root key.
        tokens: the block's token ids as little-endian int32.
        extras: what else shapes the block's state, from :func:`extras_bytes`.
    """
    # The token part has one fixed length under one root, so parent | tokens | extras is unambiguous.
    return blake2b(parent + tokens + extras, digest_size=KEY_BYTES).digest()


def extras_bytes(extras: Mapping[int, bytes]) -> bytes:
    """Encode ``{offset in block: bytes}``, tagged and length-prefixed; empty for no extras."""
    return b"".join(
        b"X" + struct.pack("<IQ", offset, len(extras[offset])) + extras[offset] for offset in sorted(extras)
    )
