"""What generation needs of a model: the protocol of a decoder, over a cache and without one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvcache_core.errors import CacheFull
from kvcache_core.frontend import FrontendCache
from kvcache_core.sequence import Sequence as CachedSequence
from kvcache_core.types import TokenIds

__all__ = ["CacheDecoder", "Decoder", "RecomputeDecoder", "RunningSequence"]


class RunningSequence(Protocol):
    """What generation needs of a sequence."""

    num_cached: int

    def fork(self) -> Any:
        """A second sequence with the same past."""

    def close(self) -> None:
        """Give its room back."""


class Decoder(Protocol):
    """What generation needs of a model: each adapter makes one from its cache."""

    def open(self, tokens: Sequence[int], max_new_tokens: int) -> Any:
        """A sequence that has ``num_cached`` of ``tokens`` already."""

    def step(self, seqs: Sequence[Any], tokens: Sequence[Sequence[int]]) -> NDArray[Any]:
        """Append tokens to each row; returns the logits [B, V] behind each row's last token."""

    def step_greedy(self, seqs: Sequence[Any], tokens: Sequence[Sequence[int]]) -> NDArray[np.int64]:
        """As :meth:`step`, for the most likely next tokens alone: int64 [B]."""

    def decode_greedy(
        self, seqs: Sequence[Any], tokens: Sequence[Sequence[int]], count: int, eos_ids: Collection[int]
    ) -> NDArray[np.int64]:
        """Greedy tokens [B, n], 1 <= n <= count; stops behind the step in which a row chose one of ``eos_ids``."""

    def fits(self, running: Sequence[tuple[int, int]]) -> bool:
        """Whether rows of (prompt tokens, new tokens) can run together."""

    def check_fits(self, prompt: int, new: int, copies: int) -> None:
        """Raise CacheFull if a prompt with ``copies`` continuations cannot run even alone."""

    def cached_length(self, tokens: Sequence[int]) -> int:
        """How many leading tokens are in the cache now."""


class CacheDecoder:
    """Generation's view of a cache (:class:`Decoder`)."""

    def __init__(self, cache: FrontendCache) -> None:
        self._cache = cache
        self._block_size = cache.core.block_size

    def open(self, tokens: Sequence[int], max_new_tokens: int) -> CachedSequence:
        """Open a sequence, with room reserved for what it will generate."""
        return self._cache.open_fresh(tokens, max_new_tokens)

    def step(self, seqs: Sequence[CachedSequence], tokens: Sequence[TokenIds]) -> Any:
        """Logits [B, V] behind each row's last token."""
        return self._cache.step(seqs, tokens)

    def step_greedy(self, seqs: Sequence[CachedSequence], tokens: Sequence[TokenIds]) -> NDArray[np.int64]:
        """The most likely next tokens [B]."""
        return self._cache.step_greedy(seqs, tokens)

    def decode_greedy(
        self, seqs: Sequence[CachedSequence], tokens: Sequence[TokenIds], count: int, eos_ids: Collection[int]
    ) -> NDArray[np.int64]:
        """Greedy tokens [B, n] of several steps."""
        return self._cache.decode_greedy(seqs, tokens, count, eos_ids)

    def cached_length(self, tokens: Sequence[int]) -> int:
        """How many leading tokens are in the cache now."""
        return self._cache.core.cached_length(tokens, self._cache.salt)

    def fits(self, running: Sequence[tuple[int, int]]) -> bool:
        """Whether rows of (prompt tokens, new tokens) fit, if they share nothing."""
        return self._needed(running) <= self._cache.core.num_blocks

    def check_fits(self, prompt: int, new: int, copies: int) -> None:
        """Raise CacheFull if the prompt cannot run even alone."""
        needed = self._needed([(prompt, new)]) + (copies - 1) * (self._blocks(new) + 1)
        capacity = self._cache.core.num_blocks
        if needed > capacity:
            raise CacheFull(
                f"a prompt of {prompt} tokens with {new} new tokens needs {needed} blocks of "
                f"{self._block_size} tokens; the whole cache has {capacity}; make it larger (size= or memory=) "
                "or shorten the prompt",
                needed=needed,
                available=capacity,
                capacity=capacity,
            )

    def _needed(self, rows: Sequence[tuple[int, int]]) -> int:
        """Blocks in the layer group that needs most."""
        groups = [group for group in self._cache.core.groups if group.kind != "output"]
        return max(sum(self._blocks(self._kept(*row, group.window)) for row in rows) for group in groups)

    def _kept(self, prompt: int, new: int, window: int | None) -> int:
        """Tokens a row holds at most: all, or its prompt and then its window."""
        total = prompt + new
        return total if window is None else min(total, max(prompt, window) + 2 * self._block_size)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._block_size)


class RecomputeDecoder:
    """The decoder without a cache: every step runs the model over all tokens so far.

    Args:
        forward: ragged rows of token ids -> logits [B, V] behind each row's last token.
    """

    def __init__(self, forward: Callable[[list[list[int]]], NDArray[Any]]) -> None:
        self._forward = forward

    def open(self, tokens: Sequence[int], max_new_tokens: int) -> _PlainSequence:
        """A sequence that starts empty."""
        return _PlainSequence([])

    def step(self, seqs: Sequence[_PlainSequence], tokens: Sequence[Sequence[int]]) -> NDArray[Any]:
        """Append tokens to each row and recompute every row."""
        for seq, new in zip(seqs, tokens, strict=True):
            seq.tokens += new
        return self._forward([seq.tokens for seq in seqs])

    def step_greedy(self, seqs: Sequence[_PlainSequence], tokens: Sequence[Sequence[int]]) -> NDArray[np.int64]:
        """The most likely next tokens [B]."""
        chosen: NDArray[np.int64] = self.step(seqs, tokens).argmax(axis=-1)
        return chosen

    def decode_greedy(
        self, seqs: Sequence[_PlainSequence], tokens: Sequence[Sequence[int]], count: int, eos_ids: Collection[int]
    ) -> NDArray[np.int64]:
        """One step: nothing is saved by several."""
        return self.step_greedy(seqs, tokens)[:, None]

    def fits(self, running: Sequence[tuple[int, int]]) -> bool:
        """Always: nothing is kept."""
        return True

    def check_fits(self, prompt: int, new: int, copies: int) -> None:
        """Nothing to check: nothing is kept."""

    def cached_length(self, tokens: Sequence[int]) -> int:
        """As if all were there: no prompt waits for another one's prefix."""
        return len(tokens)


class _PlainSequence:
    """A list of tokens that can be forked and closed like a sequence."""

    num_cached = 0

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def fork(self) -> _PlainSequence:
        return _PlainSequence(list(self.tokens))

    def close(self) -> None:
        self.tokens = []
