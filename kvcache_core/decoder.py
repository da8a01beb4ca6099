"""What generation needs of a model: the protocol of a decoder, and the decoder over a cache."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvcache_core.errors import CacheFull
from kvcache_core.frontend import FrontendCache
from kvcache_core.match import LayerGroup
from kvcache_core.readahead import Ahead
from kvcache_core.recompute import RecomputeDecoder
from kvcache_core.sequence import Sequence as CachedSequence
from kvcache_core.types import TokenIds

__all__ = ["CacheDecoder", "Decoder", "RecomputeDecoder", "RunningSequence"]


class RunningSequence(Protocol):
    """What generation needs of a sequence."""

    num_cached: int
    length: int

    def fork(self) -> Any:
        """A second sequence with the same past."""

    def truncate(self, length: int) -> None:
        """Forget every token from position ``length`` on."""

    def close(self) -> None:
        """Give its room back."""


class Decoder(Protocol):
    """What generation needs of a model: each adapter makes one from its cache."""

    cached: bool
    """Whether sequences keep their state: only then do chunks and drafts save anything."""

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

    def step_all(self, seqs: Sequence[Any], tokens: Sequence[Sequence[int]]) -> Sequence[NDArray[Any]]:
        """As :meth:`step`, with the logits behind each new token: per row [T, V]."""

    def step_greedy_all(self, seqs: Sequence[Any], tokens: Sequence[Sequence[int]]) -> Sequence[NDArray[np.int64]]:
        """As :meth:`step_greedy`, behind each new token: per row [T]."""

    def step_top(
        self, seqs: Sequence[Any], tokens: Sequence[Sequence[int]], count: int
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """As :meth:`step`, for the most likely next tokens: log-probabilities [B, count], falling, and tokens."""

    def step_scores(
        self, seqs: Sequence[Any], tokens: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
    ) -> Sequence[tuple[NDArray[np.float64], NDArray[np.int64]]]:
        """Append tokens; per row the log-probability of each target, and the most likely token in its place.

        A row's targets stand behind its last new tokens, as many as there are targets.
        """

    def check_tokens(self, tokens: Sequence[int]) -> None:
        """Raise InvalidInput for ids that the model does not have."""

    def fits(self, running: Sequence[tuple[Any, int, int, int]], prompt: tuple[int, int, int], shared: int) -> bool:
        """Whether a prompt has room beside running rows.

        Args:
            running: (sequence, tokens of its prompt, new tokens, continuations) of each row; more than one
                continuation only until they are forked.
            prompt: (tokens, new tokens, continuations).
            shared: leading tokens of the prompt that a running row holds.
        """

    def check_fits(self, prompt: int, new: int, copies: int) -> None:
        """Raise CacheFull if a prompt with ``copies`` continuations cannot run even alone."""

    def cached_length(self, tokens: Sequence[int]) -> int:
        """How many leading tokens are in the cache now."""

    def prefetch(self, tokens: Sequence[int], worth: int) -> Ahead:
        """Begin to read what :meth:`open` will want, if waiting for it takes as long as computing ``worth`` tokens."""


class CacheDecoder:
    """Generation's view of a cache (:class:`Decoder`)."""

    cached = True

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

    def prefetch(self, tokens: Sequence[int], worth: int) -> Ahead:
        """Begin to read what the tiers have of a prompt that waits."""
        return self._cache.prefetch(tokens, worth)

    def step_all(self, seqs: Sequence[CachedSequence], tokens: Sequence[TokenIds]) -> list[NDArray[Any]]:
        """Logits behind each new token, per row [T, V]."""
        return self._cache.step_all(seqs, tokens)

    def step_greedy_all(self, seqs: Sequence[CachedSequence], tokens: Sequence[TokenIds]) -> list[NDArray[np.int64]]:
        """The most likely token behind each new token, per row [T]."""
        return self._cache.step_greedy_all(seqs, tokens)

    def step_top(
        self, seqs: Sequence[CachedSequence], tokens: Sequence[TokenIds], count: int
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Log-probabilities [B, count] of the most likely next tokens, and the tokens."""
        return self._cache.step_top(seqs, tokens, count)

    def step_scores(
        self, seqs: Sequence[CachedSequence], tokens: Sequence[TokenIds], targets: Sequence[Sequence[int]]
    ) -> list[tuple[NDArray[np.float64], NDArray[np.int64]]]:
        """Log-probabilities of the targets, and the most likely tokens."""
        return self._cache.step_scores(seqs, tokens, targets)

    def check_tokens(self, tokens: Sequence[int]) -> None:
        """Raise InvalidInput for ids that the model's embedding does not have."""
        self._cache.check_vocabulary(tokens)

    def fits(
        self, running: Sequence[tuple[CachedSequence, int, int, int]], prompt: tuple[int, int, int], shared: int
    ) -> bool:
        """Whether a prompt has room: blocks that are free or evictable, less what running rows will still take."""
        length, new, copies = prompt
        core = self._cache.core
        with core.lock:
            more = core.most_blocks - core.num_blocks
            for number, group in enumerate(core.groups):
                if group.kind == "output":
                    continue
                needed = self._alone(length, new, group) + self._forks(new, copies)
                needed -= shared // self._block_size if group.window is None else 0
                for seq, tokens, added, forks in running:
                    held = len(seq.tables[number]) - seq.dropped[number]
                    # One more: a shared last block is copied when it is written.
                    needed += max(0, self._blocks(self._kept(tokens + added, 0, group.window)) - held) + 1
                    needed += self._forks(added, forks)
                if needed > group.pool.num_available + more:
                    return False
        return True

    def check_fits(self, prompt: int, new: int, copies: int) -> None:
        """Raise CacheFull if the prompt cannot run even alone."""
        groups = [group for group in self._cache.core.groups if group.kind != "output"]
        needed = max(self._alone(prompt, new, group) for group in groups)
        needed += self._forks(new, copies)
        capacity = self._cache.core.most_blocks
        if needed > capacity:
            each = f" in each of {copies} continuations" if copies > 1 else ""
            raise CacheFull(
                f"a prompt of {prompt} tokens with {new} new tokens{each} needs {needed} blocks of "
                f"{self._block_size} tokens; the whole cache has {capacity}; make it larger (size= or memory=) "
                "or shorten the prompt",
                needed=needed,
                available=capacity,
                capacity=capacity,
            )

    def _alone(self, prompt: int, new: int, group: LayerGroup) -> int:
        """Blocks that a row takes in a layer group, at most; a step has a new state's block beside the old one's."""
        return self._blocks(self._kept(prompt, new, group.window)) + (group.kind == "state")

    def _forks(self, new: int, copies: int) -> int:
        """Blocks that further continuations add: their own tokens, and a copy of the prompt's last block."""
        return (copies - 1) * (self._blocks(new) + 1)

    def _kept(self, prompt: int, new: int, window: int | None) -> int:
        """Tokens a row holds at most: all, or its prompt and then its window."""
        total = prompt + new
        return total if window is None else min(total, max(prompt, window) + 2 * self._block_size)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._block_size)
