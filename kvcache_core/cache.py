"""The block cache: opens, steps, forks, truncates and closes sequences over one pool of blocks."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from collections.abc import Sequence as _Sequence
from dataclasses import replace
from operator import gt

import numpy as np

from kvcache_core.errors import CacheFull, InvalidInput, SequenceClosed, StaleSequence, StepError, UsageError
from kvcache_core.eviction import Blocks
from kvcache_core.inputs import MAX_TOKEN, check_salt, checked_extras, token_array, whole
from kvcache_core.layout import BlockLayout
from kvcache_core.match import LayerGroup, first_visible_block, match_prefix
from kvcache_core.placement import Placement
from kvcache_core.plan import Reservation, StepPlan
from kvcache_core.pool import BlockPool, PoolResize, check_size
from kvcache_core.prefix import PrefixIndex
from kvcache_core.reserve import Room
from kvcache_core.sequence import Sequence
from kvcache_core.stats import CacheStats
from kvcache_core.tails import Tails
from kvcache_core.transaction import NEEDS_BLOCK, Transactions
from kvcache_core.types import Evicted, SeqId, TokenIds

__all__ = ["BlockCache", "token_array"]


class BlockCache:
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

    def __init__(
        self,
        num_blocks: int = 4096,
        block_size: int = 16,
        *,
        layout: BlockLayout | None = None,
        namespace: bytes = b"",
    ) -> None:
        if layout is not None:
            block_size = layout.block_size
        if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
            raise InvalidInput(f"block_size must be a whole number of tokens, at least 1; got {block_size!r}")
        kinds = (("attention", None),) if layout is None else layout.groups
        self.layout = layout
        self.block_size = block_size
        self.namespace = namespace
        self.groups = tuple(LayerGroup(kind, window, BlockPool(num_blocks)) for kind, window in kinds)
        self._index = PrefixIndex(block_size, [num_blocks] * len(kinds))
        self._kv_groups = [group for group in self.groups if group.kind != "output"]
        self._windows = [group.window for group in self.groups]
        self._blocks = Blocks(self._index, self.groups)
        tails = Tails(self._blocks)
        self._room = Room(tails)
        self._placement = Placement(self._room)
        self._moves = Transactions(tails)
        self._lock = threading.RLock()
        self.saver: Callable[[Sequence, str | os.PathLike[str]], None] | None = None
        self._open: dict[SeqId, Sequence] = {}
        self._next_id = 0
        self._hit_tokens = 0
        self._miss_tokens = 0

    @property
    def num_blocks(self) -> int:
        """Capacity in blocks of each layer group."""
        return self.groups[0].pool.num_blocks

    @property
    def lock(self) -> threading.RLock:
        """Held by every method; hold it to do several things as one."""
        return self._lock

    def save(self, seq: Sequence, path: str | os.PathLike[str]) -> None:
        """Write a sequence's state to a file, if a store is behind this cache (an adapter's ``KVCache``)."""
        self._check_mine(seq)
        seq.check_usable("save")
        if self.saver is None:
            raise UsageError("this cache keeps no tensors: save sequences of an adapter's KVCache")
        self.saver(seq, path)

    @property
    def on_evict(self) -> Callable[[list[Evicted]], None] | None:
        """Called with the findable blocks that lose their content, one call per step, under the lock and before
        anything can overwrite their bytes. It must not raise and must not call the cache. :meth:`clear` does not
        call it.
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

    def open(
        self,
        token_ids: TokenIds,
        salt: bytes = b"",
        *,
        extra_keys: Mapping[int, bytes] | None = None,
        max_new_tokens: int = 0,
        outputs: bool = False,
    ) -> Sequence:
        """Start a sequence with whatever head of ``token_ids`` the cache holds.

        The sequence then has ``num_cached`` tokens; plan the rest, ``token_ids[seq.num_cached:]``. The last
        token is never taken from the cache, so that there is always one to compute.

        Args:
            token_ids: the prompt, one or more integers 0 .. 2**31 - 1.
            salt: only sequences with equal salt share blocks.
            extra_keys: {position: bytes}: what besides the token id shapes the state at a position, for
                example the digest of an image.
            max_new_tokens: reserve room for this many further tokens, adjacent where possible, if there is.
            outputs: whether the model's stored outputs belong to the sequence: then only a head whose outputs
                are stored too is matched, and the sequence's steps store theirs.

        Raises:
            InvalidInput: an empty prompt, ids that are no integers in range, or a salt that is not bytes.
        """
        tokens = token_array(token_ids, "a prompt")
        extras = checked_extras(extra_keys)
        check_salt(salt)
        if whole(max_new_tokens, "max_new_tokens") < 0:
            raise InvalidInput(f"max_new_tokens must be 0 or more, got {max_new_tokens}")
        with self._lock:
            groups = self.groups if outputs else self._kv_groups
            root = self._index.open_root(self.namespace, salt)
            match = match_prefix(self._index, groups, root, np.frombuffer(tokens, np.int32), extras)
            seq = Sequence(self, self._new_id(), root, len(groups))
            seq.salt, seq.extra_keys, seq.prompt = salt, extras, tokens
            seq.max_length = len(tokens) + max_new_tokens if max_new_tokens else 0
            for group, table in zip(groups, match.tables, strict=True):
                group.pool.retain(table)
            seq.nodes, seq.tables, seq.dropped = match.nodes, match.tables, match.dropped
            seq.length = seq.num_cached = match.num_tokens
            writer = self._index.writer(seq.tip)
            if isinstance(writer, Sequence):
                # Its tail is shared from now on.
                writer.room = 0
            self._index.pin(seq.tip)
            self._open[seq.id] = seq
            self._hit_tokens += match.num_tokens
            self._miss_tokens += len(tokens) - match.num_tokens
            return seq

    def cached_length(
        self, token_ids: TokenIds, salt: bytes = b"", *, extra_keys: Mapping[int, bytes] | None = None
    ) -> int:
        """How many leading tokens :meth:`open` would find now. Changes nothing, counts nothing."""
        tokens = token_array(token_ids, "a prompt")
        extras = checked_extras(extra_keys)
        check_salt(salt)
        with self._lock:
            root = self._index.root(self.namespace, salt)
            if not root:
                return 0
            values = np.frombuffer(tokens, np.int32)
            return match_prefix(self._index, self._kv_groups, root, values, extras).num_tokens

    def plan(self, seqs: _Sequence[Sequence], token_ids: _Sequence[TokenIds]) -> StepPlan:
        """Reserve a step: row b appends ``token_ids[b]`` (one or more tokens) to ``seqs[b]``.

        Raises:
            CacheFull: not enough blocks; nothing was changed.
            InvalidInput: no rows, a row without tokens, or a sequence that stands in the batch twice.
            SequenceClosed, StepError: a sequence is closed, or already in a step.
        """
        tokens = [token_array(ids, f"row {row}") for row, ids in enumerate(token_ids)]
        if not seqs or len(seqs) != len(tokens):
            raise InvalidInput(
                f"a step needs one list of new tokens per sequence, at least one; got {len(seqs)} sequences "
                f"and {len(tokens)} lists"
            )
        if len({id(seq) for seq in seqs}) != len(seqs):
            raise InvalidInput("a sequence stands in the step twice; fork it to continue it in two ways")
        with self._lock:
            for seq in seqs:
                self._check_mine(seq)
                seq.check_usable("step")
                if seq.namespace != self.namespace:
                    raise StaleSequence(
                        f"cannot step {seq!r}: the weights changed since it was opened, so its past is of another "
                        "model; close it and open a new one"
                    )
            used = len(seqs[0].tables)
            if any(len(seq.tables) != used for seq in seqs):
                raise InvalidInput("a step cannot mix sequences opened with outputs and without")
            pairs = list(zip(seqs, tokens, strict=True))
            try:
                rows = self._room.reserve(pairs)
            except CacheFull:
                # What sequences reserved ahead and have not used yet is the next thing to give.
                if not self._room.fits_unreserved(pairs, self._open.values()):
                    raise
                self._room.return_reserved(self._open.values())
                rows = self._room.reserve(pairs)
            return StepPlan(rows, self._windows[:used], self.block_size)

    def commit(
        self, plan: StepPlan, tokens: _Sequence[TokenIds] | None = None, *, unwritten: _Sequence[int] = ()
    ) -> None:
        """The step's arrays are written: append its tokens, publish full blocks, drop what windows passed.

        Args:
            plan: the step.
            tokens: each row's new tokens, where they were not known when the step was planned because a graph
                chose several by itself: at least one per row, at most as many as planned. Room that they do not
                need stays reserved for their sequence.
            unwritten: per layer group, so many leading blocks of each row's table have not been written: a window has
                passed them. They are not published.

        Raises:
            InvalidInput: ``tokens`` is not as many as that, or a block that is still visible is said to be
                unwritten; nothing was changed and the step is still open.
            StepError: the plan was committed or rolled back before.

        Example:
            >>> core = BlockCache(num_blocks=64, block_size=4)
            >>> seq = core.open([1, 2])
            >>> core.commit(core.plan([seq], [[1, 2, 0, 0, 0]]), [[1, 2, 7]])
            >>> seq.tokens
            [1, 2, 7]
        """
        rows = plan.rows if tokens is None else _with_tokens(plan, tokens)
        with self._lock:
            skipped = self._unwritten(rows, unwritten) if any(unwritten) else []
            self._finish(plan, "commit")
            for row in rows:
                self._moves.commit(row)
            for number, block in skipped:
                if self._index.node(number, block):
                    self.groups[number].pool.unmark_findable(block)
                    self._index.detach(number, block)

    def _unwritten(self, rows: _Sequence[Reservation], counts: _Sequence[int]) -> list[tuple[int, int]]:
        """(layer group, block) of the plan's new blocks that hold nothing."""
        found: list[tuple[int, int]] = []
        for row in rows:
            seq, end = row.seq, row.seq.length + len(row.tokens)
            for number, count in enumerate(counts):
                if count > first_visible_block(end, self.groups[number].window, self.block_size):
                    raise InvalidInput(f"layer group {number} can still see some of its {count} unwritten blocks")
                table = seq.tables[number][seq.length // self.block_size : count]
                found += [(number, block) for block in table if block]
        return found

    def rollback(self, plan: StepPlan) -> None:
        """Undo :meth:`plan`: every sequence is as it was, every reserved block is back.

        Raises:
            StepError: the plan was committed or rolled back before.
        """
        with self._lock:
            for row in reversed(self._finish(plan, "roll back")):
                self._room.rollback(row)

    def append(self, seqs: Sequence | _Sequence[Sequence], tokens: int | _Sequence[int]) -> None:
        """Add one token to a sequence, or one to each of several: the same as planning and committing that step.

        For who needs the bookkeeping alone (a simulator, a scheduler). A row that stays in its block costs a
        fraction of a step, and a row that does not is planned and committed.

        Args:
            seqs: a sequence, or a list of them.
            tokens: its token id, or one for each.

        Raises:
            CacheFull, InvalidInput, InvalidType, SequenceClosed, StepError: as :meth:`plan`; nothing was changed.

        Example:
            >>> core = BlockCache(num_blocks=64, block_size=4)
            >>> seq = core.open([1, 2])
            >>> core.commit(core.plan([seq], [[1, 2]]))
            >>> core.append(seq, 3)
            >>> core.append([seq], [4])
            >>> seq.tokens
            [1, 2, 3, 4]
        """
        with self._lock:
            if not isinstance(seqs, Sequence):
                self._append_all(seqs, tokens)  # type: ignore[arg-type]
                return
            if type(tokens) is int and 0 <= tokens <= MAX_TOKEN:
                # Whatever forbids a step also takes the sequence's room.
                if seqs.room and seqs._cache is self and seqs.namespace == self.namespace:
                    self._moves.append_in_room(seqs, tokens)
                    return
                if self._can_step(seqs) and self._fits([self._moves.appendable(seqs)]):
                    self._moves.append(seqs, tokens)
                    return
            self.commit(self.plan([seqs], [[tokens]]))  # type: ignore[list-item]

    def _append_all(self, seqs: _Sequence[Sequence], tokens: _Sequence[int]) -> None:
        ids = token_array(tokens, "append")
        usable = len(seqs) == len(ids) == len(set(map(id, seqs))) and all(map(self._can_step, seqs))
        if not usable or not self._fits([seq.room or self._moves.appendable(seq) for seq in seqs]):
            self.commit(self.plan(seqs, [[token] for token in ids]))
            return
        # As a step does: every row has its block before one lets go of any, which another would take.
        for seq in seqs:
            if not seq.room:
                self._moves.extend(seq)
        for seq, token in zip(seqs, ids, strict=True):
            if seq.room:
                self._moves.append_in_room(seq, token)
            else:
                self._moves.append(seq, token)

    def _fits(self, kinds: list[int]) -> bool:
        """Whether a token can be appended to rows of these kinds (:meth:`Transactions.appendable`) at once."""
        blocks = kinds.count(NEEDS_BLOCK)
        return all(kinds) and (not blocks or all(group.pool.num_available >= blocks for group in self.groups))

    def fork(self, seq: Sequence) -> Sequence:
        """A second sequence with the same past. No block is copied until one of the two writes into it."""
        with self._lock:
            self._check_mine(seq)
            seq.check_usable("fork")
            child = Sequence(self, self._new_id(), seq.root, len(seq.tables))
            child.namespace = seq.namespace
            child.length, child.num_cached = seq.length, seq.num_cached
            child.extra_keys, child.max_length = seq.extra_keys, seq.max_length
            child.salt, child.prompt = seq.salt, seq.prompt
            child.cut_tail = seq.cut_tail
            seq.room = 0
            child.nodes = list(seq.nodes)
            child.dropped = list(seq.dropped)
            child.tables = [table[: len(seq.nodes)] for table in seq.tables]
            for group, table in zip(self.groups, child.tables, strict=False):
                group.pool.retain(table)
            self._index.pin(child.root)
            self._index.pin(child.tip)
            self._open[child.id] = child
            return child

    def truncate(self, seq: Sequence, length: int) -> None:
        """Forget every token of ``seq`` from position ``length`` on.

        Raises:
            InvalidInput: ``length`` is not in 0 .. seq.length, or a sliding-window layer has dropped tokens
                that would be visible again and they are no longer cached; nothing was changed.
        """
        with self._lock:
            self._check_mine(seq)
            seq.check_usable("truncate")
            length = whole(length, "length")
            if not 0 <= length <= seq.length:
                raise InvalidInput(f"length must be 0 .. {seq.length} to truncate {seq!r}, got {length}")
            if length == seq.length:
                return
            if not self._moves.regain_window(seq, length):
                raise InvalidInput(
                    f"cannot truncate {seq!r} to {length} tokens: a sliding-window layer has dropped tokens it "
                    "would need again, and they are evicted; open the sequence anew from its tokens"
                )
            old_tip = seq.tip
            self._moves.release_from(seq, -(-length // self.block_size))
            seq.length = length
            seq.num_cached = min(seq.num_cached, length)
            seq.cut_tail = True
            seq.room = 0
            self._index.pin(seq.tip)
            self._index.unpin(old_tip)

    def close(self, seq: Sequence) -> None:
        """Give the sequence's blocks back; their content stays findable until it is evicted.

        Raises:
            SequenceClosed: it is closed already.
            StepError: it is in a step.
        """
        with self._lock:
            self._check_mine(seq)
            seq.check_usable("close")
            tip = seq.tip
            self._moves.release_from(seq, 0)
            self._index.unpin(tip)
            self._index.unpin(seq.root)
            seq.closed = True
            seq.room = 0
            del self._open[seq.id]

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

    def compact(self) -> list[PoolResize]:
        """Bring the blocks of each open sequence next to each other, so that its slots are few extents.

        For idle moments: nothing is evicted, what is cached stays found, and published blocks keep their content.
        Sequences lie one behind the other, in the order they were opened, what they reserved ahead included, with
        room to grow between them; a block that several share lies with the first of them.

        Returns:
            Per layer group, the moves {old id: new id}, for a store's ``copy_blocks``; empty where nothing is gained.

        Raises:
            StepError: a step is under way.
        """
        with self._lock:
            return self._placement.compact(self._open.values())

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

    def tokens_of(self, seq: Sequence) -> list[int]:
        """All token ids of a sequence, from its nodes."""
        with self._lock:
            self._check_mine(seq)
            if seq.closed:
                raise SequenceClosed(f"sequence {seq.id} is closed: its tokens are no longer kept")
            return self._index.tokens_of(seq.nodes)[: seq.length]

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
                        assert seq.in_step or len(table) >= len(seq.nodes)
                    assert all(not block for block in table[: seq.dropped[number]])
                findable = [block for block in range(1, group.pool.num_blocks + 1) if group.pool.is_findable(block)]
                assert all(self._index.node(number, block) for block in findable)
                if not any(seq.in_step for seq in self._open.values()):
                    for block in range(1, group.pool.num_blocks + 1):
                        assert group.pool.refs(block) == held[block]

    def _still_holds(self, found: Evicted) -> bool:
        """Whether a block can still be found and holds what ``found`` says."""
        pool = self.groups[found.group].pool
        if found.block > pool.num_blocks or not pool.is_findable(found.block):
            return False
        return self._index.key(self._index.node(found.group, found.block)) == found.key

    def _finish(self, plan: StepPlan, verb: str) -> _Sequence[Reservation]:
        if plan.finished:
            raise StepError(f"cannot {verb} this plan: it was committed or rolled back before")
        self._check_mine(plan.rows[0].seq)
        plan.finished = True
        return plan.rows

    def _can_step(self, seq: Sequence) -> bool:
        return seq._cache is self and not seq.closed and not seq.in_step and seq.namespace == self.namespace

    def _check_mine(self, seq: Sequence) -> None:
        if seq._cache is not self:
            raise InvalidInput(f"{seq!r} belongs to another cache")

    def _new_id(self) -> SeqId:
        self._next_id += 1
        return SeqId(self._next_id)


def _with_tokens(plan: StepPlan, tokens: _Sequence[TokenIds]) -> list[Reservation]:
    """The plan's rows with the tokens that they came to have."""
    ids = [token_array(row, f"row {number}") for number, row in enumerate(tokens)]
    found, planned = [len(row) for row in ids], [len(row.tokens) for row in plan.rows]
    if len(found) != len(planned) or any(map(gt, found, planned)):
        raise InvalidInput(f"the rows of this step may have at most {planned} new tokens, got {found}")
    return [replace(row, tokens=own) for row, own in zip(plan.rows, ids, strict=True)]
