"""Tiers under a block cache: evicted blocks go down, with ``write_through`` published ones too, and matches come up."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from kvcache_core.admission import Admission, ChainAdmission, admission
from kvcache_core.blockformat import BlockCodec, Buffer
from kvcache_core.cache import BlockCache
from kvcache_core.demotion import Pending
from kvcache_core.errors import InvalidInput
from kvcache_core.keys import root_key
from kvcache_core.layout import BlockLayout
from kvcache_core.opentiers import OpenTiers
from kvcache_core.poolitems import block_codecs, block_items, key_of, pool_items
from kvcache_core.promotion import Promotion
from kvcache_core.readahead import Ahead
from kvcache_core.sequence import Sequence as CachedSequence
from kvcache_core.spilling import spill
from kvcache_core.staging import Staging
from kvcache_core.store import KVStore
from kvcache_core.tiercosts import Average, TierStats
from kvcache_core.tiers import Item, Tier
from kvcache_core.types import Evicted, TokenIds
from kvcache_core.waiting import within

__all__ = ["TierStack", "TierStats"]

_ROOTS = 4096
_EXPORT_BYTES = 16 << 20
"""Bytes that are copied out of the pool at once: of such pieces memory is kept and used again."""

_STAGING_BYTES = 64 << 20


class TierStack(OpenTiers):
    """The tiers of one block cache.

    Args:
        tiers: URLs or :class:`~kvcache_core.tiers.Tier` objects, the nearest first.
        admit: which blocks are written: :class:`~kvcache_core.admission.ChainAdmission` asks it.
        write_through: write a block as soon as it is full, to every tier that outlives the process, so that others see
            it before it is evicted.
        options: see :class:`~kvcache_core.opentiers.OpenTiers`.

    Attributes:
        refused_blocks: blocks that ``admit`` refused.
        promoted_blocks: blocks that came back.
        promoted_tokens: their tokens.
        trouble: the last error that kept a block from being queued.

    Raises:
        InvalidInput: ``write_through`` without a tier that others could see.
    """

    def __init__(
        self,
        tiers: Sequence[str | Tier],
        *,
        admit: Admission | str = "all",
        write_through: bool = False,
        **options: Any,
    ) -> None:
        self._admit = ChainAdmission(admission(admit))
        super().__init__(tiers, **options)
        if write_through and self.persistent is None:
            self._let_go()
            raise InvalidInput("write_through needs a tier that others can see, such as disk:PATH or valkey://HOST")
        self._write_through = write_through
        self.refused_blocks = self.promoted_blocks = self.promoted_tokens = 0
        self.trouble: Exception | None = None
        self._core: BlockCache | None = None
        self._store: KVStore | None = None
        self._promotion: Promotion | None = None
        self._codecs: OrderedDict[bytes, list[BlockCodec]] = OrderedDict()
        self._lock = threading.Lock()
        self._compute = Average()
        self._staging = Staging(_STAGING_BYTES)
        self.sources: list[Callable[[Callable[[bytes], bool]], Iterable[Sequence[Item]]]] = []
        """What else is spilled: called with (whether to leave a key out), gives values a few at a time."""

    # ---- who is served -------------------------------------------------------------------------

    def bind(self, core: BlockCache, store: KVStore) -> None:
        """Serve a cache: its evicted blocks go down from now on."""
        self._core, self._store = core, store
        self._codecs.clear()
        self._promotion = Promotion(self, core, store, self._codecs)
        core.on_evict = self.demote
        core.on_publish = self.publish if self._write_through or self._admit.asks else None

    def serve(self, layout: BlockLayout, namespace: bytes, weights: bytes, salt: bytes) -> None:
        """Blocks of this namespace and salt may go down and come up: they are of ``weights``."""
        root = root_key(layout.block_size, namespace, salt)
        with self._lock:
            if root in self._codecs:
                self._codecs.move_to_end(root)
                return
            self._codecs[root] = block_codecs(layout, weights, salt, self.secret)
            while len(self._codecs) > _ROOTS:
                self._codecs.popitem(last=False)

    # ---- down ----------------------------------------------------------------------------------

    def demote(self, evicted: Sequence[Evicted]) -> None:
        """Queue what can be found by key; copies the bytes now, writes them later. Never raises."""
        by_group: dict[int, list[Evicted]] = {}
        for one in evicted:
            if self._may_go_down(one) and not self.is_kept(key_of(one)) and self._admits(one):
                by_group.setdefault(one.group, []).append(one)
        for group, found in by_group.items():
            try:
                queued = self._queue(group, found)
            except Exception as error:
                # An eviction is in the middle of a step, and the step must go on.
                queued = 0
                self.trouble = error
            self.demoted_blocks += queued
            self.dropped_blocks += len(found) - queued

    def _may_go_down(self, one: Evicted) -> bool:
        return one.key is not None and one.root in self._codecs

    def _admits(self, one: Evicted) -> bool:
        admitted = self._admit.evicted(one.key or b"", one.parent)
        self.refused_blocks += not admitted
        return admitted

    def _queue(self, group: int, found: list[Evicted]) -> int:
        """Copy blocks into the queue while there is room; returns how many."""
        store = self._store
        if store is None:
            return 0
        nbytes = store.layout.packed_bytes(group)
        fitting = [one for at, one in enumerate(found) if self.queue.room_for((at + 1) * nbytes)]
        if not fitting:
            return 0
        # In the order of their places, where runs of them are copied at once; queued in the order of their eviction.
        places = sorted(one.block for one in fitting)
        contents: dict[int, Buffer] = {}
        step = max(1, _EXPORT_BYTES // nbytes)
        for at in range(0, len(places), step):
            some = places[at : at + step]
            packed = store.export_blocks(group, some, self._staging.take(len(some), nbytes))
            contents.update((block, row.data) for block, row in zip(some, packed, strict=True))
        queued = 0
        for one in fitting:
            payload = contents[one.block]
            encode = partial(self._codecs[one.root][group].encode, one.key or b"", payload)
            queued += self.queue.put(key_of(one), Pending(payload, nbytes, encode))
        return queued

    def publish(self, published: Sequence[Evicted]) -> None:
        """Ask ``admit``; with ``write_through``, queue blocks that stay in the pool: the writer thread copies their
        bytes when it comes to them. Never raises.
        """
        first, store = self.persistent, self._store
        for one in published:
            admitted = self._admit.published(one.group, one.key or b"", one.parent)
            if first is None or store is None or not (self._write_through and admitted and self._may_go_down(one)):
                continue
            if not self.has(first, key_of(one)):
                nbytes = store.layout.packed_bytes(one.group)
                pending = Pending(None, nbytes, partial(self._encode_published, one), through=True)
                self.demoted_blocks += self.queue.put(key_of(one), pending)

    def _encode_published(self, one: Evicted, created: int) -> Buffer | None:
        """The value of a block that was published, if it still is what it was; else its eviction has queued it."""
        core, store, codecs = self._core, self._store, self._codecs.get(one.root)
        if core is None or store is None or codecs is None:
            return None
        try:
            return next((value for _, value in block_items(core, store, {one.root: codecs}, [one], created)), None)
        except Exception as error:
            self.trouble = error
            self.dropped_blocks += 1
            return None

    # ---- up ------------------------------------------------------------------------------------

    def promote(self, seq: CachedSequence) -> None:
        """Go on with a prefix match below the pool: ``seq`` then holds what was found, as if it had been cached."""
        if self._promotion is None or seq.closed or seq.in_step:
            return
        blocks, tokens = self._promotion.promote(seq, self._compute.value)
        self.promoted_blocks += blocks
        self.promoted_tokens += tokens

    def prefetch(self, tokens: TokenIds, salt: bytes, worth: int) -> Ahead:
        """Begin to read what :meth:`promote` will ask for when this prompt is opened.

        Args:
            tokens: a prompt that waits.
            salt: whose it is.
            worth: only if it takes as long to wait for the tiers as to compute so many tokens.
        """
        if self._promotion is None or not self.slow_tiers():
            return Ahead()
        return self._promotion.prefetch(tokens, salt, self._compute.value, worth)

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

    def counters(self) -> dict[str, int]:
        """The counters that are part of :class:`~kvcache_core.stats.CacheStats`."""
        return {
            "demoted_blocks": self.demoted_blocks,
            "dropped_blocks": self.dropped_blocks,
            "prefetched_blocks": self.prefetched_blocks,
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
        # What waits may go to a tier that ends with the process: it has to be there before that is copied.
        if everything and not self._flush_pool(deadline):
            return False
        return self.flush_tiers(deadline)

    def _flush_pool(self, deadline: float | None) -> bool:
        try:
            return self.queue.flush(deadline) and within(deadline, partial(self._spill, deadline))
        except TimeoutError:
            return False

    def _spill(self, deadline: float | None) -> bool:
        """Write the pool, and what volatile tiers hold, into the first persistent tier."""
        return self.persistent is None or spill(self, self.persistent, self._spilled, deadline)

    def _spilled(self, skip: Callable[[bytes], bool]) -> Iterator[Sequence[Item]]:
        if self._core is not None and self._store is not None:
            yield from pool_items(self._core, self._store, self._codecs, skip=skip)
        for source in self.sources:
            yield from source(skip)

    def close(self, timeout: float = 5.0, *, everything: bool = True) -> bool:
        """Flush within ``timeout`` seconds and let go of every tier; whether nothing was lost.

        Tiers that were handed over as objects stay open: they belong to whoever made them.
        """
        deadline = time.monotonic() + timeout
        done = self.flush(timeout, everything=everything)
        if self._core is not None and self._core.on_evict == self.demote:
            self._core.on_evict = self._core.on_publish = None
        done = self.close_tiers(deadline) and done
        self._core = self._store = self._promotion = None
        return done
