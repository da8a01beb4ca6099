"""The open sequences of a cache: opened with what is cached, forked, truncated, closed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping

import numpy as np

from kvcache_core.errors import InvalidInput, SequenceClosed, UsageError
from kvcache_core.eviction import Blocks
from kvcache_core.inputs import check_salt, checked_extras, token_array, whole
from kvcache_core.layout import BlockLayout
from kvcache_core.match import LayerGroup, match_prefix
from kvcache_core.placement import Placement
from kvcache_core.pool import BlockPool
from kvcache_core.prefix import PrefixIndex
from kvcache_core.reserve import Room
from kvcache_core.sequence import Sequence
from kvcache_core.sharing import UseClock
from kvcache_core.tails import Tails
from kvcache_core.transaction import Transactions
from kvcache_core.types import SeqId, TokenIds

__all__ = ["OpenSequences"]


class OpenSequences:
    """The sequences of a :class:`BlockCache`, its pools and its index, behind one lock."""

    def __init__(
        self,
        num_blocks: int = 4096,
        block_size: int = 16,
        *,
        layout: BlockLayout | None = None,
        namespace: bytes = b"",
        clock: UseClock | None = None,
    ) -> None:
        if layout is not None:
            block_size = layout.block_size
        if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
            raise InvalidInput(f"block_size must be a whole number of tokens, at least 1; got {block_size!r}")
        kinds = (("attention", None),) if layout is None else layout.groups
        self.layout = layout
        self.block_size = block_size
        self.namespace = namespace
        self.groups = tuple(LayerGroup(kind, window, BlockPool(num_blocks, clock)) for kind, window in kinds)
        self._index = PrefixIndex(block_size, [num_blocks] * len(kinds))
        self._kv_groups = [group for group in self.groups if group.kind != "output"]
        self._kinds = [(group.kind, group.window) for group in self.groups]
        self._has_states = any(group.kind == "state" for group in self.groups)
        self._blocks = Blocks(self._index, self.groups)
        tails = Tails(self._blocks)
        self._room = Room(tails)
        self._placement = Placement(self._room)
        self._moves = Transactions(tails)
        self._lock = threading.RLock() if clock is None else clock.lock
        self._readers: list[int] = []
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

    def fork(self, seq: Sequence) -> Sequence:
        """A second sequence with the same past. No block is copied until one of the two writes into it."""
        with self._lock:
            self._check_mine(seq)
            seq.check_usable("fork")
            child = Sequence(self, self._new_id(), seq.root, len(seq.tables))
            child.namespace = seq.namespace
            child.length, child.num_cached = seq.length, seq.num_cached
            child.extra_keys, child.max_length = dict(seq.extra_keys), seq.max_length
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
            InvalidInput: ``length`` is not in 0 .. seq.length; a sliding-window layer has dropped tokens that
                would be visible again and they are no longer cached; or a state layer has no state there, because
                it is not a block's end, or that block is no longer cached; nothing was changed.
        """
        with self._lock:
            self._check_mine(seq)
            seq.check_usable("truncate")
            length = whole(length, "length")
            if not 0 <= length <= seq.length:
                raise InvalidInput(f"length must be 0 .. {seq.length} to truncate {seq!r}, got {length}")
            if length == seq.length:
                return
            if self._has_states and length % self.block_size:
                end = length // self.block_size * self.block_size
                raise InvalidInput(
                    f"cannot truncate {seq!r} to {length} tokens: a state layer keeps its state at the ends of blocks "
                    f"of {self.block_size} tokens; truncate to {end} and step the tokens behind it again"
                )
            if not self._moves.regain_window(seq, length):
                raise InvalidInput(
                    f"cannot truncate {seq!r} to {length} tokens: a sliding-window or state layer has dropped what it "
                    "would need again, and it is evicted; open the sequence anew from its tokens"
                )
            old_tip = seq.tip
            self._moves.release_from(seq, -(-length // self.block_size))
            seq.length = length
            seq.num_cached = min(seq.num_cached, length)
            seq.cut_tail = True
            seq.room = 0
            self._index.pin(seq.tip)
            self._index.unpin(old_tip)

    def rewind(self, seq: Sequence, fork: Sequence) -> None:
        """Make ``seq`` hold what ``fork``, a fork of it made before, holds; the fork stays as it is.

        A fork keeps what a window or a state layer would let go of, so this goes back where :meth:`truncate` cannot.

        Raises:
            InvalidInput: ``fork`` holds something that ``seq`` does not begin with; nothing was changed.
        """
        with self._lock:
            for one in (seq, fork):
                self._check_mine(one)
                one.check_usable("rewind")
            tokens, kept = self.tokens_of(seq), self.tokens_of(fork)
            if seq.root != fork.root or len(seq.tables) != len(fork.tables) or tokens[: len(kept)] != kept:
                raise InvalidInput(f"cannot rewind {seq!r} to {fork!r}: it does not begin with what that holds")
            old_tip = seq.tip
            tables = [table[: len(fork.nodes)] for table in fork.tables]
            for group, table in zip(self.groups, tables, strict=False):
                group.pool.retain(table)
            self._index.pin(fork.tip)
            self._moves.release_from(seq, 0)
            self._index.unpin(old_tip)
            seq.nodes, seq.tables, seq.dropped = list(fork.nodes), tables, list(fork.dropped)
            seq.length, seq.cut_tail = fork.length, fork.cut_tail
            seq.num_cached = min(seq.num_cached, fork.length)
            seq.room = fork.room = 0

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

    def save(self, seq: Sequence, path: str | os.PathLike[str]) -> None:
        """Write a sequence's state to a file, if a store is behind this cache (an adapter's ``KVCache``)."""
        self._check_mine(seq)
        seq.check_usable("save")
        if self.saver is None:
            raise UsageError("this cache keeps no tensors: save sequences of an adapter's KVCache")
        self.saver(seq, path)

    def tokens_of(self, seq: Sequence) -> list[int]:
        """All token ids of a sequence, from its nodes."""
        with self._lock:
            self._check_mine(seq)
            if seq.closed:
                raise SequenceClosed(f"sequence {seq.id} is closed: its tokens are no longer kept")
            return self._index.tokens_of(seq.nodes)[: seq.length]

    def _check_mine(self, seq: Sequence) -> None:
        if seq._cache is not self:
            raise InvalidInput(f"{seq!r} belongs to another cache")

    def _new_id(self) -> SeqId:
        self._next_id += 1
        return SeqId(self._next_id)
