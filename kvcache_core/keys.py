"""Chained 128-bit keys: the identity of a block is everything up to its last token.

The chain starts from a root that holds the namespace (weights, layout) and the caller's salt, so a block can
only be found by whoever shares both. The idea of chaining block digests is vLLM's prefix cache; unlike there
every field is tagged and length-prefixed, so that no two inputs have the same encoding.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from hashlib import blake2b

__all__ = ["KEY_BYTES", "block_extras", "block_key", "chain_keys", "extras_bytes", "root_key"]

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


def chain_keys(root: bytes, tokens: bytes, block_size: int, extra_keys: Mapping[int, bytes]) -> list[bytes]:
    """The keys of the full blocks in ``tokens`` (int32 bytes), which start behind ``root``.

    Args:
        root: the root key, or the key of the block before.
        tokens: little-endian int32 token ids.
        block_size: tokens per block.
        extra_keys: {position: bytes}, counted from the first of ``tokens``.
    """
    width = 4 * block_size
    keys = []
    key = root
    for number in range(len(tokens) // width):
        extras = extras_bytes(block_extras(extra_keys, number, block_size)) if extra_keys else b""
        key = block_key(key, tokens[number * width : (number + 1) * width], extras)
        keys.append(key)
    return keys


def block_extras(extra_keys: Mapping[int, bytes], block_index: int, block_size: int) -> dict[int, bytes]:
    """The extra keys that fall into one block, by offset in the block."""
    first = block_index * block_size
    if len(extra_keys) <= block_size:
        end = first + block_size
        return {position - first: value for position, value in extra_keys.items() if first <= position < end}
    found = ((offset, extra_keys.get(first + offset)) for offset in range(block_size))
    return {offset: value for offset, value in found if value is not None}
