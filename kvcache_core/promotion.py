"""The way up: a prefix match goes on below the pool, and what it finds there is as if it had been cached."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from kvcache_core.blockformat import BlockCodec, Buffer
from kvcache_core.cache import BlockCache, token_array
from kvcache_core.errors import CacheFull
from kvcache_core.keys import chain_keys, root_key
from kvcache_core.opentiers import OpenTiers, Wanted, tier_key
from kvcache_core.poolitems import Codecs
from kvcache_core.readahead import Ahead
from kvcache_core.sequence import Sequence as CachedSequence
from kvcache_core.staging import Staging
from kvcache_core.store import KVStore
from kvcache_core.types import TokenIds

__all__ = ["Promotion"]

_CHUNK_BYTES = 64 << 20
"""Bytes promoted in one transaction: one batched read per tier, and a bound on memory."""
_STAGED_BYTES = 16 << 20
"""Bytes that are copied into the pool at once: few enough to stay in the processor's cache on the way."""

Row = list[Wanted]
"""One block of tokens: what is wanted of it, per layer group."""


class Promotion:
    """Blocks on their way from tiers into one cache.

    Args:
        tiers: where they come from.
        core: the cache's bookkeeping.
        store: its tensors.
        codecs: of the namespaces and salts that may come up.
    """

    def __init__(self, tiers: OpenTiers, core: BlockCache, store: KVStore, codecs: Codecs) -> None:
        self._tiers = tiers
        self._core = core
        self._store = store
        self._codecs = codecs
        self._staging = Staging(_STAGED_BYTES)

    def promote(self, seq: CachedSequence, seconds_per_token: float) -> tuple[int, int]:
        """Let ``seq`` hold what the tiers have behind its match; returns the blocks and the tokens that came up.

        Args:
            seq: a sequence that was just opened.
            seconds_per_token: what computing costs; 0.0 if that is unknown.
        """
        blocks = tokens = 0
        while True:
            rows = self._next_rows(seq)
            if not rows:
                return blocks, tokens
            with self._tiers.lease():
                found = self._promote_rows(seq, rows, seconds_per_token)
            blocks += found * len(seq.tables)
            tokens += found * self._core.block_size
            if found < len(rows):
                return blocks, tokens

    def _next_rows(self, seq: CachedSequence) -> list[Row]:
        """What comes behind the tokens that ``seq`` holds; the block of the last token is always computed."""
        size = self._core.block_size
        first, last = seq.length // size, (len(seq.prompt) - 1) // size
        codecs = self._codecs.get(root_key(size, seq.namespace, seq.salt))
        if first >= last or codecs is None:
            return []
        used = codecs[: len(seq.tables)]
        return _rows(used, seq.prompt_keys[first : min(last, first + _per_chunk(used))])

    def prefetch(self, token_ids: TokenIds, salt: bytes, seconds_per_token: float, worth: int) -> Ahead:
        """See :meth:`~kvcache_core.tiering.TierStack.prefetch`."""
        core, size = self._core, self._core.block_size
        tokens = token_array(token_ids, "a prompt")
        first, last = core.cached_length(tokens, salt) // size, (len(tokens) - 1) // size
        root = root_key(size, core.namespace, salt)
        codecs = self._codecs.get(root)
        if first >= last or codecs is None:
            return Ahead()
        used = codecs[: sum(group.kind != "output" for group in core.groups)]
        rows = _rows(used, chain_keys(root, tokens[: last * size].tobytes(), size, {})[first:])
        seconds = seconds_per_token * size
        return self._tiers.read_ahead(rows, _per_chunk(used), _row_bytes(used), seconds, worth * seconds_per_token)

    def _promote_rows(self, seq: CachedSequence, rows: list[Row], seconds_per_token: float) -> int:
        """Promote the head of ``rows`` that is complete, in one transaction; returns how many."""
        core, size = self._core, self._core.block_size
        found = self._fetch(seq, rows, seconds_per_token)
        if not found:
            return 0
        first = seq.length // size
        tokens = seq.prompt[seq.length : (first + found) * size]
        try:
            plan = core.plan([seq], [tokens])
        except CacheFull:
            return 0
        try:
            for group in range(len(seq.tables)):
                blocks = plan.groups[group].block_tables[0, first : first + found].tolist()
                self._import(group, blocks, [row[group].payload for row in rows[:found]])
        except BaseException:
            core.rollback(plan)
            raise
        core.commit(plan)
        core.count_as_cached(seq)
        return found

    def _import(self, group: int, blocks: list[int], payloads: list[Buffer]) -> None:
        """Copy payloads into the pool, a few at a time through memory that is used again."""
        many = max(1, _STAGED_BYTES // len(payloads[0]))
        for at in range(0, len(blocks), many):
            part = payloads[at : at + many]
            packed = self._staging.take(len(part), len(part[0]))
            for row, payload in zip(packed, part, strict=True):
                row[:] = np.frombuffer(payload, np.uint8)
            self._store.import_blocks(group, blocks[at : at + many], packed)

    def _fetch(self, seq: CachedSequence, rows: list[Row], seconds_per_token: float) -> int:
        """Fill in payloads; returns how many leading blocks are complete."""
        # One layer group may have lost a block that another still has in the pool.
        pooled = self._pooled(seq, len(rows))
        missing = [
            one
            for row, here in zip(rows, pooled, strict=True)
            for one, block in zip(row, here, strict=True)
            if not block
        ]
        codecs = self._codecs[root_key(self._core.block_size, seq.namespace, seq.salt)]
        nbytes = _row_bytes(codecs[: len(seq.tables)])
        self._tiers.read(missing, nbytes, seconds_per_token * self._core.block_size)
        return self._export_pooled(seq, rows)

    def _pooled(self, seq: CachedSequence, count: int) -> list[list[int]]:
        """For each of the next ``count`` blocks: its block in the pool for each layer group, or 0."""
        first = seq.length // self._core.block_size
        groups = [blocks[first:] for blocks in self._core.prompt_blocks(seq)]
        return [[blocks[at] if at < len(blocks) else 0 for blocks in groups] for at in range(count)]

    def _export_pooled(self, seq: CachedSequence, rows: list[Row]) -> int:
        """Take what is still missing from the pool; returns how many leading blocks are complete."""
        if all(one.payload is not None for row in rows for one in row):
            return len(rows)
        with self._core.lock:
            for at, (row, here) in enumerate(zip(rows, self._pooled(seq, len(rows)), strict=True)):
                for group, (one, block) in enumerate(zip(row, here, strict=True)):
                    if one.payload is None and not block:
                        return at
                    if one.payload is None:
                        one.payload = self._store.export_blocks(group, [block])[0].data
        return len(rows)


def _rows(codecs: Sequence[BlockCodec], keys: Sequence[bytes]) -> list[Row]:
    """What is wanted of the blocks with these chained keys."""
    return [
        [Wanted(tier_key("block", group, key), partial(codec.decode, key)) for group, codec in enumerate(codecs)]
        for key in keys
    ]


def _row_bytes(codecs: Sequence[BlockCodec]) -> int:
    """Bytes of the values of one block of tokens."""
    return sum(codec.value_bytes for codec in codecs)


def _per_chunk(codecs: Sequence[BlockCodec]) -> int:
    """Blocks of tokens that are promoted in one transaction."""
    return max(1, _CHUNK_BYTES // _row_bytes(codecs))
