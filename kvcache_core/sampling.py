"""Choosing the next token from logits, in numpy: the same choice in every framework."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcache_core.errors import InvalidInput

__all__ = ["Sampling", "log_softmax", "pick", "top"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose a token.

    Args:
        temperature: 0 for greedy; otherwise logits are divided by it.
        top_k: keep the k most likely tokens.
        top_p: keep the smallest set of most likely tokens whose probability reaches p (nucleus sampling,
            Holtzman et al. 2020).
        seed: seed of the random choice; None for a fresh one.

    Raises:
        InvalidInput: a value out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InvalidInput(f"temperature must be 0 (greedy) or positive, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise InvalidInput(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InvalidInput(f"top_p must be in (0, 1], got {self.top_p}")

    def generator(self, row: int) -> np.random.Generator:
        """The row's own random stream: its tokens do not depend on which rows share its batch."""
        return np.random.default_rng(None if self.seed is None else [self.seed, row])


def pick(logits: NDArray[Any], sampling: Sampling, random: np.random.Generator) -> int:
    """Choose one token.

    Args:
        logits: [V].
        sampling: how to choose.
        random: the row's random stream; unused for greedy.

    Example:
        >>> pick(np.array([0.0, 3.0, 1.0]), Sampling(), np.random.default_rng())
        1
    """
    if not sampling.temperature:
        return int(logits.argmax())
    scores = logits.astype(np.float64) / sampling.temperature
    kept = len(scores)
    if sampling.top_k is not None and sampling.top_k < kept:
        kept = sampling.top_k
    order = np.argpartition(-scores, kept - 1)[:kept] if kept < len(scores) else np.arange(kept)
    order = order[np.argsort(-scores[order], kind="stable")]
    weights = np.exp(scores[order] - scores[order[0]])
    weights /= weights.sum()
    if sampling.top_p is not None:
        cut = int(np.searchsorted(np.cumsum(weights), sampling.top_p)) + 1
        order, weights = order[:cut], weights[:cut] / weights[:cut].sum()
    at = int(np.searchsorted(np.cumsum(weights), random.random(), side="right"))
    return int(order[min(at, len(order) - 1)])


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Log-probabilities over the last axis, in float64."""
    scores = logits.astype(np.float64)
    scores -= scores.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    return result


def top(logits: NDArray[Any], count: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The most likely tokens of each row.

    Args:
        logits: [B, V].
        count: how many; all if there are fewer.

    Returns:
        Their log-probabilities, float64 [B, count], falling, and the tokens, int64 [B, count].

    Example:
        >>> top(np.log(np.array([[0.5, 0.2, 0.3]])), 2)[1]
        array([[0, 2]])
    """
    scores = log_softmax(logits)
    count = min(count, scores.shape[1])
    best = np.argpartition(-scores, count - 1, axis=1)[:, :count]
    best = np.take_along_axis(
        best, np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1, kind="stable"), axis=1
    )
    return np.take_along_axis(scores, best, axis=1), best
