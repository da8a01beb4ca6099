"""The block cache: steps over open sequences, and everything between the steps."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as _Sequence
from contextlib import contextmanager

import numpy as np

from kvcache_core.inputs import check_size, token_array
from kvcache_core.placement import CompactHook
from kvcache_core.planning import PlannedSteps
from kvcache_core.sequence import Sequence
from kvcache_core.sharing import LimitOf
from kvcache_core.stats import CacheStats
from kvcache_core.types import Evicted, PoolResize

__all__ = ["BlockCache", "token_array"]


class BlockCache(PlannedSteps):
    """Bookkeeping of a K/V cache: which block holds which tokens. Holds no tensors; thread-safe.

    A step is a transaction: :meth:`plan` reserves blocks and says where everything lies, the caller
    computes and writes the new tokens, :meth:`commit` makes them part of their sequences and findable.
    :meth:`rollback` gives everything back instead.

    Invariants (:meth:`check_valid` asserts them):
        - what :class:`BlockPool` and :class:`PrefixIndex` promise, in every layer group.
        - a block's references equal the number of block tables that hold it.
        - a sequence has exactly the nodes its length needs, and their tokens are its tokens.
        - every block of an open sequence that holds tokens is attached to the sequence's node.

    Args:
        num_blocks: capacity in blocks (of each layer group).
        block_size: tokens per block; a layout's own block size wins.
        layout: what a token stores in which layer; optional. Without it there is one layer group with
            full causal attention.
        namespace: bytes that stand for the weights and whatever else makes results incompatible; nothing
            is ever found across namespaces.
        clock: what uses share an order, and a lock, with.

    Example:
        >>> core = BlockCache(num_blocks=64, block_size=4)
        >>> first = core.open([1, 2, 3, 4, 5, 6])
        >>> core.commit(core.plan([first], [[1, 2, 3, 4, 5, 6]]))
        >>> second = core.open([1, 2, 3, 4, 5, 9])
        >>> second.num_cached
        5
        >>> plan = core.plan([second], [[9]])
        >>> plan.positions.tolist(), plan.copies.tolist()
        ([[5]], [[2, 3]])
        >>> core.commit(plan)
    """

    @property
    def on_evict(self) -> Callable[[list[Evicted]], None] | None:
        """Called with the findable blocks that lose their content, under the lock and before anything can overwrite
        their bytes: once for all that a planned step evicts and once for each tail that it writes in place, once per
        block that :meth:`append` evicts, once per layer group at a resize. It must not raise and must not call the
        cache. :meth:`clear` does not call it.
        """
        return self._blocks.on_evict

    @on_evict.setter
    def on_evict(self, hook: Callable[[list[Evicted]], None] | None) -> None:
        self._blocks.on_evict = hook

    @property
    def on_publish(self) -> Callable[[list[Evicted]], None] | None:
        """Called with full blocks that can be found from now on, under the lock, at the commit that wrote them. It must
        not raise and must not call the cache; a block may be evicted again when it looks (:meth:`keys_in`).
        """
        return self._blocks.on_publish

    @on_publish.setter
    def on_publish(self, hook: Callable[[list[Evicted]], None] | None) -> None:
        self._blocks.on_publish = hook

    def share(self, limit: LimitOf) -> None:
        """From now on the limit that this gives is asked before a step evicts: another kind of content shares it."""
        self._room.limit = limit

    @property
    def most_blocks(self) -> int:
        """Capacity in blocks of each layer group, with what the other kind of content could give up."""
        limit = self._room.limit()
        return self.num_blocks + (0 if limit is None else limit.more_blocks)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """No block changes its place by itself, and no array its size in another thread, while this is entered: for who
        reads the arrays behind a commit. A step under way has the same effect.
        """
        me = threading.get_ident()
        with self._lock:
            self._readers.append(me)
        try:
            yield
        finally:
            with self._lock:
                self._readers.remove(me)
                self._settle()

    def is_still(self, *, growing: bool) -> bool:
        """Whether nobody reads or writes the arrays now, so that the capacity may change.

        Args:
            growing: it would become larger: no block moves, so a :meth:`reading` of this thread does not mind.
        """
        me = threading.get_ident()
        with self._lock:
            readers = any(not (growing and reader == me) for reader in self._readers)
            return not readers and not any(seq.in_step for seq in self._open.values())

    def findable_blocks(self) -> list[Evicted]:
        """Every full block that can be found now, as :attr:`on_evict` would describe it."""
        with self._lock:
            found: list[Evicted] = []
            for number, group in enumerate(self.groups):
                blocks = [block for block in range(1, group.pool.num_blocks + 1) if group.pool.is_findable(block)]
                found += self._blocks.describe(number, blocks)
            return [one for one in found if one.key is not None]

    def keys_in(self, found: _Sequence[Evicted], namespace: bytes | None = None) -> list[bytes | None]:
        """The keys that blocks would have in ``namespace``, or their own; None for one that no longer is what
        ``found`` says.

        While the caller holds :attr:`lock` the others stay as they are.
        """
        with self._lock:
            if namespace is None:
                return [one.key if self._still_holds(one) else None for one in found]
            here = [at for at, one in enumerate(found) if self._still_holds(one)]
            nodes = [self._index.node(found[at].group, found[at].block) for at in here]
            keys: list[bytes | None] = [None] * len(found)
            for at, key in zip(here, self._index.keys_in(nodes, namespace), strict=True):
                keys[at] = key
            return keys

    def salts(self) -> list[bytes]:
        """The salts under which something is kept in the current namespace."""
        with self._lock:
            return self._index.salts(self.namespace)

    def prompt_blocks(self, seq: Sequence) -> list[list[int]]:
        """Per layer group: the block of each full block of the prompt's tokens that the index knows, 0 for a gap.

        More than the sequence was matched with when another layer group has lost its part.
        """
        with self._lock:
            self._check_mine(seq)
            prompt = np.frombuffer(seq.prompt, np.int32)
            nodes = self._index.walk(seq.root, prompt, len(prompt) // self.block_size, seq.extra_keys)
            return [self._index.blocks(number, nodes).tolist() for number in range(len(seq.tables))]

    def count_as_cached(self, seq: Sequence) -> None:
        """What ``seq`` holds was found elsewhere (in a lower tier), not computed: count it as cached."""
        with self._lock:
            self._check_mine(seq)
            found = seq.length - seq.num_cached
            seq.num_cached = seq.length
            self._hit_tokens += found
            self._miss_tokens -= found

    def resize(self, num_blocks: int) -> list[PoolResize]:
        """Change the capacity while sequences are open; shrinking evicts, nothing in use is lost.

        Returns:
            Per layer group, the evicted blocks and the moves {old id: new id} that a store has to follow.

        Raises:
            CacheFull: more blocks are live than ``num_blocks``; nothing was changed.
            StepError: a step is under way.
        """
        check_size(num_blocks)
        with self._lock:
            return self._placement.resize(num_blocks, self._open.values())

    def compact(self, before: CompactHook | None = None) -> list[PoolResize]:
        """Bring the blocks of each open sequence next to each other, so that its slots are few extents.

        For idle moments: nothing is evicted, what is cached stays found, and published blocks keep their content.
        Sequences lie one behind the other, in the order they were opened, what they reserved ahead included, with
        room to grow between them; a block that several share lies with the first of them.

        Args:
            before: called with what will be returned, before anything is changed: when it raises, nothing is. A store
                that may lack memory reads here what it writes afterwards.

        Returns:
            Per layer group, the moves {old id: new id}, for a store's ``copy_blocks``; empty where nothing is gained.

        Raises:
            StepError: a step is under way.
        """
        with self._lock:
            return self._placement.compact(self._open.values(), before)

    def clear(self) -> None:
        """Drop everything that is cached and not held by an open sequence."""
        with self._lock:
            for number, group in enumerate(self.groups):
                for block in group.pool.drop_cached():
                    self._index.detach(number, block)

    def stats(self) -> CacheStats:
        """Counters since the cache was made, and what it holds now."""
        with self._lock:
            pools = [group.pool for group in self.groups]
            return CacheStats(
                hit_tokens=self._hit_tokens,
                miss_tokens=self._miss_tokens,
                evicted_blocks=self._blocks.evicted_blocks,
                live_blocks=sum(pool.num_live for pool in pools),
                cached_blocks=sum(pool.num_cached for pool in pools),
                free_blocks=sum(pool.num_free for pool in pools),
                num_blocks=sum(pool.num_blocks for pool in pools),
                block_size=self.block_size,
                open_sequences=len(self._open),
                bytes_per_block=self.layout.bytes_per_block if self.layout else 0,
            )

    def check_valid(self) -> None:
        """Assert every invariant; expensive, for tests."""
        with self._lock:
            tips: Counter[int] = Counter()
            for seq in self._open.values():
                tips.update((seq.root, seq.tip))
                assert len(seq.nodes) == -(-seq.length // self.block_size)
                if seq.room:
                    assert not seq.in_step and not seq.closed
                    assert self._index.writer(seq.tip) is seq and self._moves.tails.is_private(seq)
                    assert seq.room + seq.length % self.block_size == self.block_size
                assert seq.length == 0 or self._index.fill(seq.nodes[-1]) >= (seq.length - 1) % self.block_size + 1
            self._index.check_valid(tips)
            for number, group in enumerate(self.groups):
                group.pool.check_valid()
                held: Counter[int] = Counter()
                for seq in self._open.values():
                    if number >= len(seq.tables):
                        continue
                    table = seq.tables[number]
                    held.update(block for block in table if block)
                    if not seq.in_step:
                        pairs = zip(seq.nodes, table, strict=False)
                        assert all(not block or self._index.block(number, node) == block for node, block in pairs)
                        assert len(table) >= len(seq.nodes)
                    assert all(not block for block in table[: seq.dropped[number]])
                findable = [block for block in range(1, group.pool.num_blocks + 1) if group.pool.is_findable(block)]
                assert all(self._index.node(number, block) for block in findable)
                # What nobody holds and cannot be found is free: the index must not know it.
                free = [block for block in group.pool.free.blocks() if self._index.node(number, block)]
                assert not free, free
                if not any(seq.in_step for seq in self._open.values()):
                    for block in range(1, group.pool.num_blocks + 1):
                        assert group.pool.refs(block) == held[block]

    def _still_holds(self, found: Evicted) -> bool:
        """Whether a block can still be found and holds what ``found`` says."""
        pool = self.groups[found.group].pool
        if found.block > pool.num_blocks or not pool.is_findable(found.block):
            return False
        return self._index.key(self._index.node(found.group, found.block)) == found.key
