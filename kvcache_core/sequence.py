"""One sequence: its tokens, positions and block tables."""

from __future__ import annotations

import os
from array import array
from typing import TYPE_CHECKING

from kvcache_core.errors import SequenceClosed, StepError
from kvcache_core.keys import chain_keys, root_key
from kvcache_core.types import SeqId

if TYPE_CHECKING:
    from kvcache_core.sequences import OpenSequences

__all__ = ["Sequence"]


class Sequence:
    """A run of tokens with its place in the cache. Made by :meth:`BlockCache.open` and :meth:`fork`.

    Attributes:
        length: tokens held so far; the next token's position.
        num_cached: leading tokens that were found when the sequence was opened: they need no compute.
        closed: whether the sequence was closed.
    """

    __slots__ = (
        "_cache",
        "_prompt_keys",
        "closed",
        "cut_tail",
        "dropped",
        "extra_keys",
        "id",
        "in_step",
        "length",
        "max_length",
        "namespace",
        "nodes",
        "num_cached",
        "prompt",
        "room",
        "root",
        "salt",
        "tables",
    )

    def __init__(self, cache: OpenSequences, seq_id: SeqId, root: int, num_groups: int) -> None:
        self._cache = cache
        self.id = seq_id
        self.root = root
        self.length = 0
        self.num_cached = 0
        self.namespace = cache.namespace
        self.closed = False
        self.in_step = False
        self.cut_tail = False
        """Whether the sequence itself truncated its last block, and so may overwrite what follows in it."""
        self.max_length = 0
        """Blocks are reserved up to this length when there is room."""
        self.room = 0
        """Tokens that may be appended without a look around: the tail is this sequence's alone, with so much space."""
        self.nodes: list[int] = []
        """Nodes of the prefix index, one per block that holds tokens."""
        self.tables: list[list[int]] = [[] for _ in range(num_groups)]
        """Per layer group: block ids; may reach beyond ``nodes`` (reserved ahead)."""
        self.dropped: list[int] = [0] * num_groups
        """Per layer group: leading blocks that a window has dropped (null in the table)."""
        self.extra_keys: dict[int, bytes] = {}
        self.salt = b""
        self.prompt = array("i")
        """The tokens that the sequence was opened with."""
        self._prompt_keys: list[bytes] | None = None

    @property
    def tip(self) -> int:
        """The node that the next token is written in or behind."""
        return self.nodes[-1] if self.nodes else self.root

    @property
    def prompt_keys(self) -> list[bytes]:
        """The chained keys of the prompt's full blocks; made when first asked for."""
        if self._prompt_keys is None:
            size = self._cache.block_size
            root = root_key(size, self.namespace, self.salt)
            self._prompt_keys = chain_keys(root, self.prompt.tobytes(), size, self.extra_keys)
        return self._prompt_keys

    @property
    def tokens(self) -> list[int]:
        """All token ids held so far."""
        return self._cache.tokens_of(self)

    def fork(self) -> Sequence:
        """A second sequence with the same past; blocks are shared, and copied only when written."""
        return self._cache.fork(self)

    def truncate(self, length: int) -> None:
        """Forget every token from position ``length`` on, for example rejected speculative tokens."""
        self._cache.truncate(self, length)

    def rewind(self, fork: Sequence) -> None:
        """Hold what ``fork``, a fork of this sequence made before, holds: also where :meth:`truncate` cannot go."""
        self._cache.rewind(self, fork)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state of all tokens to a file that :meth:`KVCache.load` of either framework reads."""
        self._cache.save(self, path)

    def close(self) -> None:
        """Give the blocks back; what they hold stays findable until it is evicted."""
        self._cache.close(self)

    def check_usable(self, verb: str) -> None:
        """Raise unless the sequence is open and in no step."""
        if self.closed:
            raise SequenceClosed(f"cannot {verb} sequence {self.id}: it is closed; open a new one")
        if self.in_step:
            raise StepError(f"cannot {verb} sequence {self.id}: it is in a step; commit or roll back first")

    @property
    def cache_is_locked_here(self) -> bool:
        """Whether this thread is inside a call of the cache: what finalizers must not interrupt."""
        return self._cache.lock._is_owned()  # type: ignore[attr-defined,no-any-return]

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"length={self.length}, num_cached={self.num_cached}"
        return f"<Sequence {self.id} {state}>"
