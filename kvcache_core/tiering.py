"""Tiers under a block cache: evicted blocks are demoted, a prefix match goes on below and promotes what it finds."""

from __future__ import annotations

import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

import numpy as np

from kvcache_core.blockformat import (
    FORMAT_VERSION,
    KINDS,
    BlockCodec,
    Buffer,
    group_entries,
    salt_digest,
    secret_from_environment,
)
from kvcache_core.cache import BlockCache
from kvcache_core.demotion import DemotionQueue, Pending
from kvcache_core.errors import BlockRefused, CacheFull, InvalidInput, KVCacheWarning
from kvcache_core.keys import root_key
from kvcache_core.layout import BlockLayout
from kvcache_core.sequence import Sequence as CachedSequence
from kvcache_core.store import KVStore
from kvcache_core.tiers import Item, Tier, open_tier
from kvcache_core.types import Evicted

__all__ = ["TierStack", "TierStats", "block_tier_key"]

_CHUNK_BYTES = 64 << 20
"""Bytes promoted in one transaction: one batched read per tier, and a bound on memory."""
_QUEUE_BYTES = 256 << 20
_PROBE_EVERY = 64
"""A tier that costs more than recomputing is tried again once in so many lookups."""
_ROOTS = 4096


def block_tier_key(group: int, key: bytes) -> bytes:
    """The key of a block in a tier: format version, kind, layer group, chained key."""
    return bytes((FORMAT_VERSION, KINDS["block"], group)) + key


@dataclass
class TierStats:
    """What one tier has done for a cache.

    Attributes:
        name: the tier's name.
        hits: values found and used.
        misses: values asked for and not there.
        refused: values that did not verify, each a miss.
        errors: calls that failed, each a miss for all it asked for.
        skipped: lookups left out because loading costs more than recomputing.
        stored: values written.
        lost: values that could not be written.
        read_bytes: bytes of the values found.
        seconds_per_mib: what loading costs, a moving average; 0.0 before the first hit.
    """

    name: str
    hits: int = 0
    misses: int = 0
    refused: int = 0
    errors: int = 0
    skipped: int = 0
    stored: int = 0
    lost: int = 0
    read_bytes: int = 0
    seconds_per_mib: float = 0.0


@dataclass(slots=True)
class _Wanted:
    """One block of one layer group that a prefix match looks for below."""

    tier_key: bytes
    codec: BlockCodec
    key: bytes
    payload: Buffer | None = None


@dataclass
class _Moving:
    """A moving average that follows a change of load within some ten observations."""

    value: float = 0.0
    seen: int = field(default=0)

    def add(self, value: float) -> None:
        self.seen += 1
        self.value += (value - self.value) * max(0.2, 1 / self.seen)


class TierStack:
    """Tiers from the top down, a queue into the first of them, and what is known about their cost.

    Args:
        tiers: URLs or :class:`~kvcache_core.tiers.Tier` objects, the nearest first.
        queue_bytes: bytes of blocks that may wait to be written; further ones are dropped and counted.
        promote: ``"auto"``: a tier is used while loading costs less than recomputing; ``"always"``.
        secret: signs and checks every block; default is the environment's ``KVCACHE_SECRET``.

    Attributes:
        dropped_blocks: evicted blocks that were not queued because the queue was full.
        demoted_blocks: evicted blocks that were queued.
        promoted_blocks: blocks that came back.
        promoted_tokens: their tokens.
        trouble: the last error that kept a block from being queued.
    """

    def __init__(
        self,
        tiers: Sequence[str | Tier],
        *,
        queue_bytes: int = _QUEUE_BYTES,
        promote: str = "auto",
        secret: bytes | None = None,
    ) -> None:
        if promote not in ("auto", "always"):
            raise InvalidInput(f"promote must be 'auto' or 'always', got {promote!r}")
        self.tiers: list[Tier] = []
        self._own: list[Tier] = []
        try:
            for tier in tiers:
                self.tiers.append(open_tier(tier))
                if self.tiers[-1] is not tier:
                    self._own.append(self.tiers[-1])
        except BaseException:
            for opened in self._own:
                opened.close()
            raise
        for tier in self.tiers[:-1]:
            tier.keep_displaced = True
        self.secret = secret_from_environment() if secret is None else secret
        self.stats = [TierStats(tier.name) for tier in self.tiers]
        self.dropped_blocks = self.demoted_blocks = self.promoted_blocks = self.promoted_tokens = 0
        self.trouble: Exception | None = None
        self._always = promote == "always"
        self._core: BlockCache | None = None
        self._store: KVStore | None = None
        self._roots: OrderedDict[bytes, list[BlockCodec]] = OrderedDict()
        self._rewrite: set[bytes] = set()
        self._lock = threading.Lock()
        self._compute = _Moving()
        self._loads = [_Moving() for _ in self.tiers]
        self._warned: set[str] = set()
        self.queue = DemotionQueue(self.tiers, queue_bytes, self._has, self._wrote)

    # ---- who is served -------------------------------------------------------------------------

    def bind(self, core: BlockCache, store: KVStore) -> None:
        """Serve a cache: its evicted blocks go down from now on."""
        self._core, self._store = core, store
        self._roots.clear()
        core.on_evict = self.demote

    def serve(self, layout: BlockLayout, namespace: bytes, weights: bytes, salt: bytes) -> None:
        """Blocks of this namespace and salt may go down and come up: they are of ``weights``."""
        root = root_key(layout.block_size, namespace, salt)
        with self._lock:
            if root in self._roots:
                self._roots.move_to_end(root)
                return
            self._roots[root] = [
                BlockCodec(
                    group_entries(layout, group),
                    layout.packed_bytes(group),
                    layout=layout.digest,
                    weights=weights,
                    salt=salt_digest(salt),
                    group=group,
                    secret=self.secret,
                )
                for group in range(len(layout.groups))
            ]
            while len(self._roots) > _ROOTS:
                self._roots.popitem(last=False)

    # ---- down ----------------------------------------------------------------------------------

    def demote(self, evicted: Sequence[Evicted]) -> None:
        """Queue what can be found by key; copies the bytes now, writes them later. Never raises."""
        by_group: dict[int, list[tuple[Evicted, bytes]]] = {}
        for one in evicted:
            if one.key is not None and one.root in self._roots:
                tier_key = block_tier_key(one.group, one.key)
                if self.queue.get(tier_key) is None and not self._has(0, tier_key):
                    by_group.setdefault(one.group, []).append((one, tier_key))
        for group, found in by_group.items():
            try:
                queued = self._queue(group, found)
            except Exception as error:
                # An eviction is in the middle of a step, and the step must go on.
                queued = 0
                self.trouble = error
            self.demoted_blocks += queued
            self.dropped_blocks += len(found) - queued

    def _queue(self, group: int, found: list[tuple[Evicted, bytes]]) -> int:
        """Copy blocks into the queue while there is room; returns how many."""
        store = self._store
        if store is None:
            return 0
        nbytes = store.layout.packed_bytes(group)
        fitting = [pair for at, pair in enumerate(found) if self.queue.room_for((at + 1) * nbytes)]
        if not fitting:
            return 0
        packed = store.export_blocks(group, [one.block for one, _ in fitting])
        return sum(
            self.queue.put(tier_key, Pending(self._roots[one.root][group], one.key or b"", content.data))
            for (one, tier_key), content in zip(fitting, packed, strict=True)
        )

    def _has(self, number: int, tier_key: bytes) -> bool:
        """Whether writing a value to a tier would add nothing."""
        if tier_key in self._rewrite:
            return False
        try:
            return self.tiers[number].contains(tier_key)
        except Exception:
            return False

    def _wrote(self, number: int, items: Sequence[Item], error: Exception | None) -> None:
        stats = self.stats[number]
        if error is None:
            stats.stored += len(items)
            self._rewrite.difference_update(key for key, _ in items)
            return
        stats.errors += 1
        stats.lost += len(items)
        self._warn(f"tier {stats.name} did not take blocks ({error})", "write " + stats.name)

    # ---- up ------------------------------------------------------------------------------------

    def promote(self, seq: CachedSequence) -> None:
        """Go on with a prefix match below the pool: ``seq`` then holds what was found, as if it had been cached."""
        core = self._core
        if core is None or seq.closed or seq.in_step:
            return
        while True:
            wanted = self._next_blocks(seq, core)
            if not wanted or not self._promote_chunk(core, seq, wanted):
                return

    def _next_blocks(self, seq: CachedSequence, core: BlockCache) -> list[list[_Wanted]]:
        """What comes behind the tokens that ``seq`` holds: per block, one entry per layer group."""
        size = core.block_size
        first, last = seq.length // size, (len(seq.prompt) - 1) // size
        if first >= last:
            return []
        codecs = self._roots.get(root_key(size, seq.namespace, seq.salt))
        if codecs is None:
            return []
        used = range(len(seq.tables))
        count = max(1, _CHUNK_BYTES // sum(codecs[group].value_bytes for group in used))
        return [
            [_Wanted(block_tier_key(group, key), codecs[group], key) for group in used]
            for key in seq.prompt_keys[first : min(last, first + count)]
        ]

    def _promote_chunk(self, core: BlockCache, seq: CachedSequence, wanted: list[list[_Wanted]]) -> bool:
        """Promote the head of ``wanted`` that is there, in one transaction; whether that was all of it."""
        with ExitStack() as leases:
            for tier in self.tiers:
                with suppress(Exception):  # reading from it says what is wrong
                    leases.enter_context(tier.lease())
            return self._import(core, seq, wanted)

    def _import(self, core: BlockCache, seq: CachedSequence, wanted: list[list[_Wanted]]) -> bool:
        """:meth:`_promote_chunk` while the tiers' values are valid."""
        found = self._fetch(core, seq, wanted)
        if not found:
            return False
        size = core.block_size
        first = seq.length // size
        tokens = seq.prompt[seq.length : (first + found) * size]
        try:
            plan = core.plan([seq], [tokens])
        except CacheFull:
            return False
        try:
            for group in range(len(seq.tables)):
                packed = np.stack([np.frombuffer(row[group].payload or b"", np.uint8) for row in wanted[:found]])
                blocks = plan.groups[group].block_tables[0, first : first + found].tolist()
                if self._store is not None:
                    self._store.import_blocks(group, blocks, packed)
        except BaseException:
            core.rollback(plan)
            raise
        core.commit(plan)
        core.count_as_cached(seq)
        self.promoted_blocks += found * len(seq.tables)
        self.promoted_tokens += len(tokens)
        return found == len(wanted)

    def _fetch(self, core: BlockCache, seq: CachedSequence, wanted: list[list[_Wanted]]) -> int:
        """Fill in payloads, tier by tier; returns how many leading blocks are complete."""
        for row in wanted:
            for one in row:
                pending = self.queue.get(one.tier_key)
                if pending is not None:
                    one.payload = pending.payload
        # One layer group may have lost a block that another still has in the pool.
        pooled = self._pooled(core, seq, wanted)
        block_bytes = sum(one.codec.value_bytes for one in wanted[0])
        for number in range(len(self.tiers)):
            missing = [
                one
                for row, here in zip(wanted, pooled, strict=True)
                for one, block in zip(row, here, strict=True)
                if one.payload is None and not block
            ]
            if missing and self._pays(number, block_bytes):
                self._read(number, missing)
        complete = 0
        for row, here in zip(wanted, pooled, strict=True):
            if any(one.payload is None and not block for one, block in zip(row, here, strict=True)):
                break
            complete += 1
        return self._export_pooled(core, seq, wanted[:complete])

    def _pooled(self, core: BlockCache, seq: CachedSequence, wanted: list[list[_Wanted]]) -> list[list[int]]:
        """Per wanted block: its block in the pool for each layer group, or 0."""
        first = seq.length // core.block_size
        groups = [blocks[first:] for blocks in core.prompt_blocks(seq)]
        return [[blocks[at] if at < len(blocks) else 0 for blocks in groups] for at in range(len(wanted))]

    def _export_pooled(self, core: BlockCache, seq: CachedSequence, wanted: list[list[_Wanted]]) -> int:
        """Take what is still missing from the pool; returns how many leading blocks are complete."""
        if all(one.payload is not None for row in wanted for one in row) or self._store is None:
            return len(wanted)
        with core.lock:
            for at, (row, here) in enumerate(zip(wanted, self._pooled(core, seq, wanted), strict=True)):
                for group, (one, block) in enumerate(zip(row, here, strict=True)):
                    if one.payload is None and not block:
                        return at
                    if one.payload is None:
                        one.payload = self._store.export_blocks(group, [block])[0].data
        return len(wanted)

    def _read(self, number: int, missing: list[_Wanted]) -> None:
        """One batched read of one tier; what does not verify stays missing."""
        stats, started = self.stats[number], time.perf_counter()
        try:
            values = self.tiers[number].get_many([one.tier_key for one in missing])
        except Exception as error:
            stats.errors += 1
            stats.misses += len(missing)
            self._warn(f"tier {stats.name} did not answer ({error})", "read " + stats.name)
            return
        nbytes = 0
        for one, value in zip(missing, values, strict=True):
            if value is None:
                stats.misses += 1
                continue
            try:
                one.payload = one.codec.decode(one.key, value)
            except BlockRefused as refused:
                stats.refused += 1
                self._rewrite.add(one.tier_key)
                self._warn(f"tier {stats.name} holds a block that does not verify ({refused})", "refused " + stats.name)
                continue
            stats.hits += 1
            nbytes += len(value)
        if nbytes:
            stats.read_bytes += nbytes
            self._loads[number].add((time.perf_counter() - started) / nbytes)
            stats.seconds_per_mib = self._loads[number].value * 2**20

    # ---- what it costs -------------------------------------------------------------------------

    def computed(self, tokens: int, longest: int, seconds: float) -> None:
        """A step has computed ``tokens``, ``longest`` of them in one row, in ``seconds``: what loading has to beat."""
        # A decode step's fixed cost says nothing about a prompt, and the first prompts compile graphs.
        if longest > 1:
            each = seconds / tokens
            self._compute.add(min(each, 4 * self._compute.value) if self._compute.seen else each)

    @property
    def recompute_seconds_per_token(self) -> float:
        """What computing one prompt token costs, a moving average; 0.0 before the first prompt."""
        return self._compute.value

    def _pays(self, number: int, block_bytes: int) -> bool:
        """Whether loading a block from this tier costs less than computing it."""
        load, compute = self._loads[number], self._compute
        if self._always or not load.seen or not compute.seen or self._core is None:
            return True
        if load.value * block_bytes < compute.value * self._core.block_size:
            return True
        stats = self.stats[number]
        stats.skipped += 1
        return stats.skipped % _PROBE_EVERY == 0

    def counters(self) -> dict[str, int]:
        """The counters that are part of :class:`~kvcache_core.stats.CacheStats`."""
        return {
            "demoted_blocks": self.demoted_blocks,
            "dropped_blocks": self.dropped_blocks,
            "promoted_blocks": self.promoted_blocks,
            "promoted_tokens": self.promoted_tokens,
        }

    # ---- the end -------------------------------------------------------------------------------

    def flush(self, timeout: float | None = None, *, everything: bool = False) -> bool:
        """Wait until what was demoted is in its tier; whether it is.

        Args:
            timeout: seconds to wait at most.
            everything: first demote what can be found in the pool and in tiers that end with the process, down to the
                first tier that does not.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        if everything and not self._spill(deadline):
            return False
        done = self.queue.flush(deadline)
        for number, tier in enumerate(self.tiers):
            try:
                tier.flush()
            except Exception as error:
                self.stats[number].errors += 1
                self._warn(f"tier {tier.name} did not flush ({error})", "flush " + tier.name)
                done = False
        return done

    def _spill(self, deadline: float | None) -> bool:
        """Write the pool, and what volatile tiers hold, into the first persistent tier."""
        target = next((at for at, tier in enumerate(self.tiers) if tier.persistent), None)
        if target is None or self._core is None:
            return True
        with self._core.lock:
            found = self._core.findable_blocks()
        step = max(1, (_CHUNK_BYTES // 4) // max(1, self._core.layout.bytes_per_block if self._core.layout else 1))
        for at in range(0, len(found), step):
            if not self._copy_down(found[at : at + step], target) or _is_past(deadline):
                return False
        for tier in self.tiers[:target]:
            for item in tier.volatile_items():
                self.queue.write([item], target)
                if _is_past(deadline):
                    return False
        return True

    def _copy_down(self, found: Sequence[Evicted], target: int) -> bool:
        """Copy blocks of the pool that are still what they were into tier ``target``."""
        core, store = self._core, self._store
        if core is None or store is None:
            return True
        items: list[Item] = []
        with core.lock:
            for one in found:
                codecs, tier_key = self._roots.get(one.root), block_tier_key(one.group, one.key or b"")
                if codecs is None or self._has(target, tier_key) or not core.still_holds(one):
                    continue
                packed = store.export_blocks(one.group, [one.block])
                items.append((tier_key, codecs[one.group].encode(one.key or b"", packed[0].data, int(time.time()))))
        errors = self.stats[target].errors
        self.queue.write(items, target)
        return self.stats[target].errors == errors

    def close(self, timeout: float = 5.0, *, everything: bool = True) -> bool:
        """Flush within ``timeout`` seconds and let go of every tier; whether nothing was lost.

        Tiers that were handed over as objects stay open: they belong to whoever made them.
        """
        deadline = time.monotonic() + timeout
        done = self.flush(timeout, everything=everything)
        done = self.queue.close(deadline) and done
        if self._core is not None and self._core.on_evict == self.demote:
            self._core.on_evict = None
        self._core = self._store = None
        for tier in self._own:
            tier.close()
        return done

    def _warn(self, message: str, kind: str) -> None:
        """Say each kind of trouble once; the counters have the rest."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(f"{message}; computed instead, and counted in tier_stats()", KVCacheWarning, stacklevel=2)


def _is_past(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline
