"""What lies in a pool as values of a tier: to write it through, to spill it, to save it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from kvcache_core.blockformat import BlockCodec, group_entries, salt_digest
from kvcache_core.cache import BlockCache
from kvcache_core.layout import BlockLayout
from kvcache_core.opentiers import tier_key
from kvcache_core.store import KVStore
from kvcache_core.tiers import Item
from kvcache_core.types import Evicted

__all__ = ["Codecs", "block_codecs", "block_items", "key_of", "pool_items"]

_CHUNK_BYTES = 16 << 20
"""Bytes of the pool that are copied while its lock is held."""

Codecs = Mapping[bytes, Sequence[BlockCodec]]
"""{root key: codec per layer group}."""


def key_of(one: Evicted) -> bytes:
    """The key of a full block in a tier."""
    return tier_key("block", one.group, one.key or b"")


def block_codecs(layout: BlockLayout, weights: bytes, salt: bytes, secret: bytes) -> list[BlockCodec]:
    """What writes and reads the blocks of one model and salt, per layer group."""
    return [
        BlockCodec(
            group_entries(layout, group),
            layout.packed_bytes(group),
            layout=layout.digest,
            weights=weights,
            salt=salt_digest(salt),
            group=group,
            secret=secret,
        )
        for group in range(len(layout.groups))
    ]


def pool_items(
    core: BlockCache,
    store: KVStore,
    codecs: Codecs,
    *,
    skip: Callable[[bytes], bool] = lambda key: False,
    namespace: bytes | None = None,
) -> Iterator[Sequence[Item]]:
    """What can be found in a pool, as values of a tier, a few at a time.

    Args:
        core: the bookkeeping.
        store: the tensors.
        codecs: what hangs on none of these roots is left out.
        skip: called with a block's key in a tier: whether to leave it out.
        namespace: of the keys in the tier; default the blocks' own.
    """
    found = [one for one in core.findable_blocks() if one.root in codecs]
    step = max(1, _CHUNK_BYTES // max(1, store.layout.bytes_per_block))
    for at in range(0, len(found), step):
        some = [one for one in found[at : at + step] if not skip(key_of(one))]
        yield block_items(core, store, codecs, some, int(time.time()), namespace)


def block_items(
    core: BlockCache,
    store: KVStore,
    codecs: Codecs,
    found: Sequence[Evicted],
    created: int,
    namespace: bytes | None = None,
) -> list[Item]:
    """The blocks of ``found`` that still are what they were, as (key in the tier, value)."""
    with core.lock:
        keys = core.keys_in(found, namespace)
        contents = [
            store.export_blocks(one.group, [one.block])[0].data if key else b""
            for one, key in zip(found, keys, strict=True)
        ]
    return [
        (tier_key("block", one.group, key), codecs[one.root][one.group].encode(key, content, created))
        for one, key, content in zip(found, keys, contents, strict=True)
        if key
    ]
