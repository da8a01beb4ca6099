"""The activation cache's bookkeeping: which block holds which entry.

An entry is what one module computed for one sample. The pool, its states and its LRU rule are those of the blocks
of tokens (:class:`kvcache_core.pool.BlockPool`): an entry is one block. What it holds is opaque here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvcache_core.admission import Admission, AllAdmitted
from kvcache_core.analysis import Advice, advise
from kvcache_core.entrylookup import Below, Entry, EntryLookup
from kvcache_core.errors import InvalidInput, UsageError
from kvcache_core.inputs import check_size
from kvcache_core.pool import BlockPool
from kvcache_core.sharing import LimitOf, UseClock, no_limit
from kvcache_core.types import NULL_BLOCK, id_array

__all__ = ["EntryCache"]

_FIRST_CAPACITY = 256
"""Blocks of a pool that is limited by bytes, before it has grown."""


class EntryCache:
    """Entries under one limit, least recently used evicted first. Thread-safe.

    Invariants (:meth:`check_valid` asserts them):
        - what :class:`BlockPool` promises; no block is live between two calls.
        - keys and cached blocks are in one-to-one relation, and only they have a payload.
        - ``bytes`` is the sum of the entries' sizes, and at most ``memory``.

    With tiers ``below``, an evicted entry goes down, and what a call does not find comes up. Where ``limit`` gives a
    limit that another kind of content shares, that is asked before ``memory`` makes an entry go.

    Args:
        size: capacity in entries; or
        memory: capacity in bytes.
        admit: which computed entries are kept.
        clock: what uses share an order, and a lock, with.

    Example:
        >>> entries = EntryCache(size=2)
        >>> lookup = entries.look_up([b"a", b"b", b"a"])
        >>> lookup.compute, lookup.sources
        ([0, 1], {0: 0, 1: 1, 2: 0})
        >>> entries.keep(lookup, ["A", "B"], [1, 1])
        >>> entries.look_up([b"b"]).found
        ['B']
    """

    def __init__(
        self,
        size: int | None = None,
        *,
        memory: int | None = None,
        admit: Admission | None = None,
        clock: UseClock | None = None,
    ) -> None:
        if (size is None) == (memory is None):
            raise InvalidInput(f"give size (entries) or memory (bytes), got {size!r} and {memory!r}")
        self.memory = memory
        self.admit = admit or AllAdmitted()
        self.bytes = 0
        self.hit_entries = self.miss_entries = self.evicted_entries = self.refused_entries = 0
        self.clock = clock = clock or UseClock()
        self._pool = BlockPool(_FIRST_CAPACITY if size is None else size, clock)
        self._blocks: dict[bytes, int] = {}
        self._contents: dict[int, Entry] = {}
        self._stored: list[int] = []
        self._sizes = np.zeros(self._pool.num_blocks + 1, np.int64)
        self.below: Below | None = None
        self.limit: LimitOf = no_limit
        self._lock = clock.lock
        self.trace: deque[bytes] | None = None

    def record(self, accesses: int) -> None:
        """Remember the keys of the last so many accesses from now on, for :meth:`advice`; 0 stops it."""
        self.trace = deque(maxlen=accesses) if accesses else None

    def advice(self, seconds_per_miss: float = 0.0) -> Advice:
        """Which size pays, by the recorded accesses.

        Raises:
            UsageError: none are recorded.
        """
        with self._lock:
            if self.trace is None:
                raise UsageError("no accesses are recorded: call record(accesses) first")
            trace, count = list(self.trace), len(self)
            each = self.bytes / count if count else 0.0
            size = self._pool.num_blocks if self.memory is None else int(self.memory / each) if each else 0
        return advise(trace, size, seconds_per_miss=seconds_per_miss, bytes_per_entry=each)

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, key: bytes) -> bool:
        """Whether this key can be found; no access is counted."""
        return key in self._blocks

    @property
    def size(self) -> int | None:
        """Capacity in entries; None if bytes are the limit."""
        return self._pool.num_blocks if self.memory is None else None

    @property
    def mean_bytes(self) -> int:
        """Bytes of an entry, on average."""
        return self.bytes // max(1, len(self))

    @property
    def oldest(self) -> int | None:
        """When the entry that is evicted next was used last; None if there is no entry."""
        return self._pool.lru.oldest()

    def bytes_before(self, time: int) -> int:
        """Bytes of the entries that were used last before ``time``."""
        return int(self._sizes[self._pool.lru.before(time)].sum())

    def contents(self) -> list[Entry]:
        """Every entry, least recently made first."""
        with self._lock:
            return list(self._contents.values())

    def look_up(self, keys: Sequence[bytes], form: Any = None) -> EntryLookup:
        """Find the entries of a call's samples; what is found becomes the most recently used.

        Args:
            keys: one per sample.
            form: what they look like in a tier; None to look into none.
        """
        if self.below is not None and form is not None:
            missing = [key for key in dict.fromkeys(keys) if key not in self._blocks]
            for entry in self.below.find(form, missing) if missing else ():
                with self._lock:
                    self._store(entry)
                    self._settle()
        compute: list[int] = []
        sources: dict[int, int] = {}
        first: dict[bytes, int] = {}
        with self._lock:
            if self.trace is not None:
                self.trace.extend(keys)
            blocks = list(map(self._blocks.get, keys))
            found = [None if block is None else self._contents[block].payload for block in blocks]
            for sample in [at for at, block in enumerate(blocks) if block is None]:
                key = keys[sample]
                if key not in first:
                    first[key] = len(compute)
                    compute.append(sample)
                sources[sample] = first[key]
            self._pool.use([block for block in dict.fromkeys(blocks) if block is not None])  # in order, each once
            self.hit_entries += len(keys) - len(compute)
            self.miss_entries += len(compute)
        return EntryLookup(keys, found, compute, sources)

    def keep(self, lookup: EntryLookup, payloads: Sequence[Any], sizes: Sequence[int], form: Any = None) -> None:
        """Store what was computed, as far as the admission rule and the room allow.

        Args:
            lookup: what :meth:`look_up` gave.
            payloads: one per sample in ``lookup.compute``; never changed from now on.
            sizes: their bytes.
            form: what they look like in a tier.
        """
        keys = [lookup.keys[sample] for sample in lookup.compute]
        with self._lock:
            computed = zip(keys, payloads, sizes, strict=True)
            fresh = [one for one in computed if one[0] not in self._blocks]  # another thread may have been faster
            entries: list[Entry] = []
            try:
                entries.extend(Entry(*one, form) for one in fresh if self.admit.admit(one[0]))
            finally:  # a rule of the user's own may raise
                stored = self._store_all(entries)
            self.refused_entries += len(fresh) - stored

    def _store_all(self, entries: Sequence[Entry]) -> int:
        """Give entries that are not there blocks, as far as there is room or can be; how many have one."""
        if not entries:
            return 0
        rest = sum(entry.nbytes for entry in entries)
        if len(entries) > self._pool.num_free or (self.memory is not None and self.bytes + rest > self.memory):
            return self._store_each(entries, rest)
        # Nothing has to go: all at once, in a third of the time.
        blocks = self._pool.fill(len(entries))
        self._contents.update(zip(blocks, entries, strict=True))
        self._blocks.update(zip([entry.key for entry in entries], blocks, strict=True))
        self._sizes.put(id_array(blocks), [entry.nbytes for entry in entries])
        self.bytes += rest
        if self.below is not None:
            for entry in entries:
                self.below.kept(entry)
        return len(entries)

    def _store_each(self, entries: Sequence[Entry], rest: int) -> int:
        """The same, for ``rest`` bytes of entries, where something may have to go."""
        count = 0
        try:
            for entry in entries:
                rest -= entry.nbytes
                if self._store(entry, rest):
                    count += 1
                    if self.below is not None:
                        self.below.kept(entry)
        finally:
            self._settle()
        return count

    def _store(self, entry: Entry, rest: int = 0) -> bool:
        """Give an entry a block, if there is room or can be; whether it has one. ``rest`` bytes come behind it.

        The block is live until :meth:`_settle`.
        """
        if entry.key in self._blocks:
            return True
        if not self._make_room(entry.nbytes, rest):
            return False
        if not self._pool.num_available:
            self._settle()
        block, was_evicted = self._pool.take_one()
        if was_evicted:
            self._forget([block])
        self._blocks[entry.key] = block
        self._contents[block] = entry
        self._sizes[block] = entry.nbytes
        self.bytes += entry.nbytes
        self._stored.append(block)
        return True

    def _settle(self) -> None:
        """Let go of the blocks that entries were given, before one of them can be evicted: the first one goes first."""
        if self._stored:
            blocks = id_array(self._stored[::-1])
            self._stored.clear()
            self._pool.mark_all_findable(blocks)
            self._pool.release(blocks)

    def resize(self, size: int | None = None, *, memory: int | None = None) -> None:
        """Change the limit, also its kind; shrinking evicts.

        Raises:
            InvalidInput: no positive amount, or both or none given.
        """
        if (size is None) == (memory is None):
            raise InvalidInput(f"give size (entries) or memory (bytes), got {size!r} and {memory!r}")
        with self._lock:
            if size is not None:
                check_size(size)
                self.memory = None
                self._resize_pool(size)
            else:
                self.memory = memory
                while self.bytes > int(memory or 0):
                    self._forget(self._pool.evict(1))

    def clear(self) -> None:
        """Drop every entry."""
        with self._lock:
            self._forget(self._pool.drop_cached(), count=False)

    def check_valid(self) -> None:
        """Assert every invariant of the class docstring; expensive, for tests."""
        with self._lock:
            self._pool.check_valid()
            assert not self._pool.num_live
            assert len(self._blocks) == len(self._contents) == self._pool.num_cached
            for key, block in self._blocks.items():
                assert self._contents[block].key == key and self._pool.is_findable(block)
            assert self.bytes == sum(entry.nbytes for entry in self._contents.values())
            assert all(self._sizes[block] == entry.nbytes for block, entry in self._contents.items())
            assert self.memory is None or self.bytes <= self.memory

    def _make_room(self, size: int, rest: int) -> bool:
        """Evict until ``size`` more bytes fit the memory, if they ever can; True if they do."""
        if self.memory is None:
            return True
        if self.bytes + size > self.memory:
            self._settle()
        limit = self.limit() if self.bytes + size > self.memory else None
        if not (size <= self.memory if limit is None else limit.could_hold(size, rest)):
            return False
        while self.bytes + size > self.memory:
            if limit is not None:
                limit.bytes_short(size, rest)
            if self.bytes + size > self.memory:
                if not self._blocks:
                    return False
                self._forget(self._pool.evict(1))
        if not self._pool.num_free:
            self._resize_pool(2 * self._pool.num_blocks)
        return True

    def _resize_pool(self, size: int) -> None:
        result = self._pool.resize(size)
        self._forget(result.evicted)
        moved = {new: self._contents.pop(old) for old, new in result.moves.items()}
        self._sizes = np.zeros(size + 1, np.int64)
        for block, content in moved.items():
            self._contents[block] = content
            self._blocks[content.key] = block
        for place, content in self._contents.items():
            self._sizes[place] = content.nbytes

    def _forget(self, blocks: Sequence[int], *, count: bool = True) -> None:
        for block in blocks:
            if block != NULL_BLOCK:
                entry = self._contents.pop(block)
                del self._blocks[entry.key]
                self.bytes -= entry.nbytes
                self.evicted_entries += count
                if count and self.below is not None:
                    self.below.demote(entry)
