"""The decoder without a cache: every step runs the model over all tokens so far."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcache_core.errors import UsageError
from kvcache_core.readahead import Ahead
from kvcache_core.sampling import top

__all__ = ["RecomputeDecoder"]


class RecomputeDecoder:
    """The decoder without a cache: every step runs the model over all tokens so far.

    Args:
        forward: ragged rows of token ids -> logits [B, V] behind each row's last token.
        scores: ragged rows and their targets -> what :meth:`step_scores` returns; needed for scoring alone.
    """

    cached = False

    def __init__(
        self,
        forward: Callable[[list[list[int]]], NDArray[Any]],
        scores: Callable[[list[list[int]], Sequence[Sequence[int]]], Any] | None = None,
    ) -> None:
        self._forward = forward
        self._scores = scores

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

    def step_all(self, seqs: Sequence[_PlainSequence], tokens: Sequence[Sequence[int]]) -> list[NDArray[Any]]:
        """Logits behind each new token, per row [T, V]: one step per token."""
        rows = [[self.step([seq], [[token]])[0] for token in new] for seq, new in zip(seqs, tokens, strict=True)]
        return [np.stack(row) for row in rows]

    def step_greedy_all(
        self, seqs: Sequence[_PlainSequence], tokens: Sequence[Sequence[int]]
    ) -> list[NDArray[np.int64]]:
        """The most likely token behind each new token, per row [T]."""
        return [row.argmax(axis=-1) for row in self.step_all(seqs, tokens)]

    def step_top(
        self, seqs: Sequence[_PlainSequence], tokens: Sequence[Sequence[int]], count: int
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Log-probabilities [B, count] of the most likely next tokens, and the tokens."""
        return top(self.step(seqs, tokens), count)

    def step_scores(
        self, seqs: Sequence[_PlainSequence], tokens: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
    ) -> Sequence[tuple[NDArray[np.float64], NDArray[np.int64]]]:
        """Log-probabilities of the targets and the most likely tokens, every row recomputed."""
        if self._scores is None:
            raise UsageError("this decoder was made without `scores`: give a function for it to score without a cache")
        for seq, new in zip(seqs, tokens, strict=True):
            seq.tokens += new
        found: Sequence[tuple[NDArray[np.float64], NDArray[np.int64]]]
        found = self._scores([seq.tokens for seq in seqs], targets)
        return found

    def check_tokens(self, tokens: Sequence[int]) -> None:
        """Nothing to check: the model says so itself."""

    def fits(self, running: Sequence[tuple[Any, int, int, int]], prompt: tuple[int, int, int], shared: int) -> bool:
        """Always: nothing is kept."""
        return True

    def check_fits(self, prompt: int, new: int, copies: int) -> None:
        """Nothing to check: nothing is kept."""

    def cached_length(self, tokens: Sequence[int]) -> int:
        """As if all were there: no prompt waits for another one's prefix."""
        return len(tokens)

    def prefetch(self, tokens: Sequence[int], worth: int) -> Ahead:
        """Nothing: nothing is kept."""
        return Ahead()


class _PlainSequence:
    """A list of tokens that can be forked and closed like a sequence."""

    num_cached = 0

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    @property
    def length(self) -> int:
        """Tokens it holds."""
        return len(self.tokens)

    def truncate(self, length: int) -> None:
        """Forget every token from position ``length`` on."""
        del self.tokens[length:]

    def fork(self) -> _PlainSequence:
        """A second sequence with the same tokens."""
        return _PlainSequence(list(self.tokens))

    def close(self) -> None:
        """Forget all tokens."""
        self.tokens = []
