"""Speculative decoding by prompt lookup: what followed the same tokens before is tried as what follows now.

After Saxena, "Prompt Lookup Decoding" (2023), on the verification of Leviathan et al. (2023): all drafted tokens are
computed in one step, and kept up to the first that the model would not have chosen. No second model is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvcache_core.errors import InvalidInput
from kvcache_core.scheduling import WEIGHTS_IN_TOKENS

__all__ = ["Drafter", "Speculation", "worth_verifying"]

_GIVE_UP = 0.1
"""Share of accepted tokens below which a row drafts no more."""


@dataclass(frozen=True, slots=True)
class Speculation:
    """How far to look ahead.

    Args:
        tokens: drafted tokens per row and step, at most.
        ngram: longest run of last tokens that is looked up; shorter ones down to ``min_ngram`` come next.
        min_ngram: the shortest.

    Raises:
        InvalidInput: a value below 1, or ``min_ngram`` above ``ngram``.
    """

    tokens: int = 8
    ngram: int = 3
    min_ngram: int = 2

    def __post_init__(self) -> None:
        for name in ("tokens", "ngram", "min_ngram"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise InvalidInput(f"Speculation.{name} must be a whole number, at least 1; got {value!r}")
        if self.min_ngram > self.ngram:
            raise InvalidInput(f"Speculation.min_ngram={self.min_ngram} is above ngram={self.ngram}")


class Drafter:
    """One row's text, and what followed each of its n-grams last.

    Args:
        tokens: the prompt.
        speculation: how far to look ahead.

    Example:
        >>> drafter = Drafter([1, 2, 3, 4, 5, 6, 1, 2, 3], Speculation(tokens=4))
        >>> drafter.draft(limit=3)
        [4, 5, 6]
    """

    def __init__(self, tokens: Sequence[int], speculation: Speculation) -> None:
        self._speculation = speculation
        self._text: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}
        self._length = min(4, speculation.tokens)
        self._drafted = self._accepted = 0
        self.extend(tokens)

    @property
    def hopeful(self) -> bool:
        """Whether it still drafts: too many wrong tokens end it."""
        return self.rate >= _GIVE_UP

    @property
    def rate(self) -> float:
        """Share of drafted tokens that were accepted, a half before anything is known."""
        return (self._accepted + 2) / (self._drafted + 4)

    def extend(self, tokens: Sequence[int]) -> None:
        """Tokens that the row has got. An n-gram is known once a token follows it."""
        sizes = range(self._speculation.min_ngram, self._speculation.ngram + 1)
        text = self._text
        for token in tokens:
            end = len(text)
            for size in sizes:
                if size <= end:
                    self._next[tuple(text[end - size :])] = end
            text.append(int(token))

    def draft(self, limit: int) -> list[int]:
        """Up to ``limit`` tokens that may follow; none if the text says nothing or drafts were mostly wrong."""
        limit = min(limit, self._length)
        if limit < 1 or not self.hopeful:
            return []
        for size in range(self._speculation.ngram, self._speculation.min_ngram - 1, -1):
            start = self._next.get(tuple(self._text[-size:])) if size <= len(self._text) else None
            if start is not None:
                # What follows may reach the text's end: then it goes on repeating itself.
                period = len(self._text) - start
                return [self._text[start + at % period] for at in range(limit)]
        return []

    def learn(self, drafted: int, accepted: int) -> None:
        """How much of a draft was accepted: draft more next time, or less."""
        self._drafted += drafted
        self._accepted += accepted
        if drafted:
            longer = 2 * self._length if accepted == drafted else accepted + 1
            self._length = max(1, min(longer, self._speculation.tokens))


def worth_verifying(drafts: Sequence[Sequence[int]], rates: Sequence[float]) -> bool:
    """Whether a step with these drafts is expected to give more tokens per second than one without.

    A step costs its weights and its tokens, rows padded to the longest.

    Args:
        drafts: per row.
        rates: per row, the share of drafted tokens that is accepted.
    """
    rows, longest = len(drafts), max(map(len, drafts))
    saved = sum(len(draft) * rate for draft, rate in zip(drafts, rates, strict=True))
    return saved * (WEIGHTS_IN_TOKENS + rows) > rows * rows * longest
